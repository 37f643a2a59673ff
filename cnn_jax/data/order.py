"""Which examples each step takes: a pure function of (seed, step), so nothing has to be saved.

Training reads the endless concatenation of the epochs' permutations, `batch` examples a step:
no batch is partial, each example is taken once an epoch, and the position in the data *is* the
step. Evaluation reads the examples in order and pads the last batch.
"""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32

from cnn_jax.errors import UserError


@functools.lru_cache(maxsize=8)
def order(n: int, seed: int, epoch: int) -> Int32[np.ndarray, ' n']:
    """The permutation of 0…n−1 for one epoch.

    It ranks the raw output of Philox with the key (seed, epoch), whose stream NumPy keeps
    across versions and machines.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    permutation = np.argsort(bits, kind='stable').astype(np.int32)
    permutation.flags.writeable = False
    return permutation


def train_indices(
    n: int, batch: int, seed: int, step: int, process_index: int = 0, process_count: int = 1
) -> Int32[np.ndarray, ' b']:
    """The examples of training step `step` (from 0): positions step·batch … of the epochs' stream.

    Of several processes, each gets its contiguous `batch / process_count` of the global batch.

    Errors:
        UserError: `process_count` does not divide `batch`.
    """
    local = local_size(batch, process_count)
    start = step * batch + process_index * local
    taken = []
    while local:
        epoch, position = divmod(start, n)
        taken.append(order(n, seed, epoch)[position : position + local])
        start += len(taken[-1])
        local -= len(taken[-1])
    return np.concatenate(taken)


def eval_batches(
    n: int, batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[Int32[np.ndarray, ' b'], Bool[np.ndarray, ' b']]]:
    """`(index, mask)` of each evaluation batch; the last is filled up with index 0, mask False.

    Of several processes, each gets its contiguous part of every global batch.

    Errors:
        UserError: `process_count` does not divide `batch`.
    """
    local = local_size(batch, process_count)
    for start in range(0, n, batch):
        position = start + process_index * local + np.arange(local, dtype=np.int32)
        mask = position < n
        yield np.where(mask, position, 0).astype(np.int32), mask


def local_size(batch: int, process_count: int) -> int:
    """The examples that each process takes of a global batch; a remainder is a `UserError`."""
    if batch % process_count:
        raise UserError(
            f'a batch of {batch} examples cannot be divided among {process_count} processes; set '
            f'config.data.batch and config.data.eval_batch to multiples of {process_count}'
        )
    return batch // process_count
