"""Devices and processes: the mesh, how arrays are sharded over it, and how processes cooperate.

The computation is the same on any mesh: `jit` divides it by the sharding of its inputs and adds
the communication. Each of several processes holds some of the devices and computes its part of
every step. Process 0 alone reads and writes the work directory, and broadcasts what it reads or
decides. With one process the functions of this module's second half do nothing.
"""

import ctypes
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cnn_jax.errors import RunFailed, UserError

DATA, MODEL = 'data', 'model'
LARGE = 2**18  # elements of a leaf from which on dividing it pays for gathering it

HEARTBEAT = 100  # seconds without a sign of life after which JAX takes a process for dead
ENDED = (
    'another process of this run has ended (see its last message), and this one with it; rerun the '
    'same command on all of them to resume from the last checkpoint'
)
# In errors of collectives (JAX raises several types) and of the service by which processes meet.
COMMUNICATION = re.compile(
    'gloo|nccl|connection|coordination|unavailable|barrier|heartbeat', re.IGNORECASE
)

_abort_handler: Any = None  # ctypes' callback, kept alive


@dataclass(frozen=True)
class Layout:
    """The sharding of batches and state over a mesh with the axes `data` and `model`.

    `fsdp` divides large leaves of the state along `data`, too: each device keeps a part and
    gathers the others when it needs them (Rajbhandari et al. 2020, "ZeRO", stage 3).
    """

    mesh: Mesh
    fsdp: bool = False

    def __str__(self) -> str:
        sizes = ' × '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items() if size > 1)
        return (sizes or 'one device') + (', sharded parameters' if self.fsdp else '')

    @property
    def facts(self) -> dict[str, Any]:
        """The layout for a run's record; `make_mesh` takes the last two."""
        hosts = len({device.process_index for device in self.mesh.devices.flat})
        return {'processes': hosts, **self.mesh.shape, 'fsdp': self.fsdp}

    @property
    def batch(self) -> NamedSharding:
        """The sharding of arrays whose first axis is that of the examples."""
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def state_sharding(self, tree: Any) -> Any:
        """The sharding of each leaf of a state (or of its shapes).

        Matrices of at least `LARGE` elements are divided along `model` by their columns, and with
        `fsdp` every leaf of that size along `data` by its longest axis that can be; others are
        replicated.
        """
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), tree)

    def shard(self, tree: Any) -> Any:
        """Put a state that every process holds whole onto the devices, by `state_sharding`."""

        def put(leaf, sharding):
            if sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        return jax.tree.map(put, tree, self.state_sharding(tree))

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        axes: list[str | None] = [None] * len(shape)
        if np.prod(shape) < LARGE:
            return PartitionSpec()
        if len(shape) == 2 and self._divides(MODEL, shape[1]):
            axes[1] = MODEL
        free = [k for k, size in enumerate(shape) if not axes[k] and self._divides(DATA, size)]
        if self.fsdp and free:
            axes[max(free, key=lambda k: shape[k])] = DATA
        return PartitionSpec(*axes)

    def _divides(self, axis: str, size: int) -> bool:
        parts = self.mesh.shape[axis]
        return parts > 1 and size % parts == 0


def make_mesh(
    devices: Sequence[Any], batches: Sequence[int], *, model: int = 1, fsdp: bool = False
) -> Layout:
    """Arrange devices as a mesh of `data` × `model`.

    Where one process has them all, a batch that cannot be divided among them uses fewer.

    Args:
        devices: All devices of all processes, or those of a topology that is not here.
        batches: Sizes of all batches that will be divided.
        model: Devices that share each large matrix; groups of that size share the batch.
        fsdp: See `Layout`.

    Errors:
        UserError: `model` does not divide each process's devices, or they cannot divide a batch.
    """
    # In this order, each process has a part of every batch in one piece.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    hosts = len({device.process_index for device in ordered})
    parts, rest = divmod(len(ordered), model) if model > 0 else (0, 1)
    if rest or len(ordered) // hosts % model:
        raise UserError(
            f'--model_parallel={model} does not divide the number of devices of a process, '
            f'{len(ordered) // hosts}; choose a divisor'
        )
    common = math.gcd(*batches)
    if hosts == 1:
        parts = max(n for n in range(1, parts + 1) if common % n == 0)
    elif common % parts:
        raise UserError(
            f'batches of {" and ".join(map(str, sorted(set(batches))))} cannot be divided among '
            f'{parts} devices; set config.data.batch and config.data.eval_batch to multiples of '
            f'{parts}'
        )
    grid = np.array(ordered[: parts * model]).reshape(parts, model)
    return Layout(Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2), fsdp)


def initialize() -> None:
    """Connect to the other processes of this run; call before JAX is used for anything else.

    Slurm, Open MPI, TPU pods and GKE tell JAX where they are; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Errors:
        UserError: The other processes are unknown or do not answer.
    """
    names = {'process_id': 'JAX_PROCESS_ID', 'num_processes': 'JAX_NUM_PROCESSES'}
    given = {name: os.environ.get(variable) for name, variable in names.items()}
    try:
        known: dict[str, Any] = {name: int(text) for name, text in given.items() if text}
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **known)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f'--distributed did not find the other processes ({error}); outside of Slurm, '
            'Open MPI, TPU pods and GKE set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, '
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID'
        ) from error
    _explain_abort()
    # On CPUs the first collective waits for the others for 30 seconds at most, and later ones for
    # longer: so now, when all are here, and not after a download or a wait for a lock.
    on_process_zero(lambda: None)


def is_initialized() -> bool:
    """Return whether `initialize` was called; starts no device."""
    return _abort_handler is not None


def is_multiprocess() -> bool:
    """Return whether this run has more than one process."""
    return jax.process_count() > 1


def is_process_zero() -> bool:
    """Return whether this process reads and writes the work directory."""
    return jax.process_index() == 0


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Call a function in process 0 and return its value, which is JSON, in every process.

    A collective; an error that the function raises is raised in every process.
    """
    if not is_multiprocess():
        return function()
    answer: dict[str, Any] = {}
    raised: Exception | None = None
    if is_process_zero():
        try:
            answer = {'value': function()}
        except Exception as error:
            raised = error
            answer = {'error': str(error), 'usage': isinstance(error, UserError)}
    answer = json.loads(_broadcast_bytes(json.dumps(answer).encode()))
    if 'error' in answer:
        raise raised or (UserError if answer['usage'] else RunFailed)(answer['error'])
    return answer['value']


def gather_to_host(tree: Any) -> Any:
    """Gather the arrays of a tree into process 0's memory; all other processes get None for each.

    A collective, array by array: a device holds no more than one that is otherwise divided.
    """
    from jax.experimental import multihost_utils

    def gather(leaf):
        leaf = jnp.asarray(leaf)
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf) if is_process_zero() else None

    return jax.tree.map(gather, tree)


def broadcast(tree: Any, like: Any) -> Any:
    """Send the arrays of process 0, shaped as `like`, to every process, bit by bit. Collective."""

    def one(leaf, shape):
        zeros = bytes(shape.size * shape.dtype.itemsize)
        content = np.asarray(leaf).tobytes() if is_process_zero() else zeros
        return np.frombuffer(_broadcast_fixed(content), shape.dtype).reshape(shape.shape)

    return jax.tree.map(one, tree if is_process_zero() else like, like)


def exit_now(code: int) -> None:
    """End this process at once: after an error the others wait for it, so it must not wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def describe_error(error: Exception) -> str:
    """One sentence about an error; a communication error means that another process ended."""
    text = f'{type(error).__name__}: {error}'
    if is_initialized() and COMMUNICATION.search(text):
        return f'{ENDED} ({text.splitlines()[0][:200]})'
    return f'{text} (--debug shows where)'


def _broadcast_bytes(content: bytes) -> bytes:
    """Broadcast bytes of any length."""
    header = np.int64(len(content)).tobytes()
    length = int(np.frombuffer(_broadcast_fixed(header), np.int64)[0])
    padded = 1 << max(length - 1, 0).bit_length()  # few lengths, few compilations
    whole = content.ljust(padded, b' ') if is_process_zero() else bytes(padded)
    return _broadcast_fixed(whole)[:length]


def _broadcast_fixed(content: bytes) -> bytes:
    """Broadcast as many bytes as all processes expect, as integers: their sum with 0 is exact."""
    from jax.experimental import multihost_utils

    numbers = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(numbers).tobytes()


def _explain_abort() -> None:
    """Print one sentence when JAX aborts this process, which it does when another one died."""
    global _abort_handler

    def explain(_):
        os.write(2, f'failed: {ENDED}\n'.encode())
        os._exit(1)

    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)
