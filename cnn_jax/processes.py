"""Several processes of one run: how they meet, speak with one voice, and end together.

Each holds some of the devices and computes its part of every step. Process 0 alone has to do with
the work directory; what it reads or decides, it tells the others. With one process all of this
does nothing.
"""

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.errors import RunFailed, UserError

HEARTBEAT = 100  # seconds without a sign of life after which JAX takes a process for dead
ENDED = (
    'another process of this run has ended (see what it said last), and with it this one: the '
    'same command, started for all of them, goes on from the last checkpoint'
)
# In errors of collectives (JAX raises several types) and of the service by which processes meet.
SPEAKING = re.compile('gloo|nccl|connection|coordination|unavailable|barrier|heartbeat', re.I)

_at_abort: Any = None  # ctypes' callback, kept alive


def join() -> None:
    """Find the other processes; before JAX is used for anything else.

    Slurm, Open MPI, TPU pods and GKE tell JAX where they are; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Errors:
        UserError: Nothing tells, or the others do not come.
    """
    number, count = (
        int(text) if (text := os.environ.get(name)) else None
        for name in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES')
    )
    try:
        jax.distributed.initialize(
            process_id=number, num_processes=count, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f'the other processes of --distributed cannot be found ({error}); outside of Slurm, '
            'Open MPI, TPU pods and GKE set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, '
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID'
        ) from error
    _speak_at_abort()
    # On CPUs the first collective waits for the others for 30 seconds at most, and later ones for
    # longer: so now, when all are here, and not after a download or a wait for a lock.
    from_first(lambda: None)


def joined() -> bool:
    """Whether `join` was called; starts no device, unlike `several`."""
    return _at_abort is not None


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, the one that reads and writes the work directory."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Have process 0 call a function; all get what it returns, which is JSON, or its error.

    Every process must come here; those that have come wait.
    """
    if not several():
        return function()
    told: dict[str, Any] = {}
    raised: Exception | None = None
    if is_first():
        try:
            told = {'value': function()}
        except Exception as error:
            raised = error
            told = {'error': str(error), 'mistake': isinstance(error, UserError)}
    told = json.loads(_spread(json.dumps(told).encode()))
    if raised:
        raise raised
    if 'error' in told:
        raise (UserError if told['mistake'] else RunFailed)(told['error'])
    return told['value']


def gathered(tree: Any) -> Any:
    """The arrays of a tree as process 0 needs them to write them down, whole and on the host.

    One after the other: a device never holds more than one that is otherwise divided. Every
    process must come here; all but process 0 get None for each.
    """

    def gather(leaf):
        leaf = jnp.asarray(leaf)
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = _whole(leaf)
        return np.asarray(leaf) if is_first() else None

    return jax.tree.map(gather, tree)


def spread(tree: Any, like: Any) -> Any:
    """The arrays that process 0 has, for all, bit by bit.

    Args:
        tree: What process 0 has; anywhere else it is not looked at.
        like: Shapes and types of the arrays, in the same tree.
    """

    def one(leaf, shape):
        size = shape.size * shape.dtype.itemsize
        content = np.asarray(leaf).tobytes() if is_first() else bytes(size)
        return np.frombuffer(_sent(content), shape.dtype).reshape(shape.shape)

    return jax.tree.map(one, tree if is_first() else like, like)


def end(code: int) -> None:
    """Leave at once after an error: waiting for the others, who wait for this one, is in vain."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explained(error: Exception) -> str:
    """An error in words; one in speaking with the other processes means that one has ended."""
    text = f'{type(error).__name__}: {error}'
    if joined() and SPEAKING.search(text):
        return f'{ENDED} ({text.splitlines()[0][:200]})'
    return f'{text} (--debug shows where)'


def _whole(leaf: jax.Array) -> jax.Array:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)


def _spread(content: bytes) -> bytes:
    """Bytes of any length."""
    length = int(np.frombuffer(_sent(np.int64(len(content)).tobytes()), np.int64)[0])
    padded = 1 << max(length - 1, 0).bit_length()  # few lengths, few compilations
    return _sent(content.ljust(padded, b' ') if is_first() else bytes(padded))[:length]


def _sent(content: bytes) -> bytes:
    """The bytes of process 0, as many as all expect; as integers, whose sum with 0 is exact."""
    from jax.experimental import multihost_utils

    numbers = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(numbers).tobytes()


def _speak_at_abort() -> None:
    """Say a plain sentence when JAX aborts this process, which it does when another one died."""
    global _at_abort

    def speak(_):
        os.write(2, f'failed: {ENDED}\n'.encode())
        os._exit(1)

    _at_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(speak)
    ctypes.CDLL(None).signal(signal.SIGABRT, _at_abort)
