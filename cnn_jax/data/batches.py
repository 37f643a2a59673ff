"""Batches on the device, from arrays that live there or streamed from a source.

The order is a pure function of (seed, step), so nothing has to be saved. Training reads the
endless concatenation of the epochs' permutations (or `balanced_indices`), `batch` examples a step;
no batch is partial. Evaluation reads the examples in order and pads the last batch.

Both providers yield the same batches:
`{'image': uint8 [B, H, W, C], 'label': int32 [B], 'index': int32 [B], 'mask': bool [B]}`, where
`index` is the example's position in the source and `mask` is False for padding.
"""

import contextlib
import copy
import functools
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from hashlib import sha256
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float64, Int32, UInt8

from cnn_jax import config
from cnn_jax.data.decode import RULE, image_shape, parallel_map, resize_image
from cnn_jax.data.source import Source, digest
from cnn_jax.data.sources import open_split
from cnn_jax.data.splits import subset
from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder, cached_array
from cnn_jax.runtime import cores

Batch = dict[str, Array]
Indices = tuple[Int32[np.ndarray, ' b'], Bool[np.ndarray, ' b']]  # index, mask
Process = tuple[int, int]  # number, from 0, and count of those that share each batch
PART = 32  # images that a thread reads at a time: large enough to hide the cost of handing it over
SAMPLE_BYTES = 2**30  # decoded pixels that the statistics are computed from, at most
SAMPLE_CHUNK = 1024  # images read at once for them, so that memory stays flat


@functools.lru_cache(maxsize=8)
def order(n: int, seed: int, epoch: int) -> Int32[np.ndarray, ' n']:
    """The permutation of 0…n−1 for one epoch: ranks of Philox's raw output, which NumPy keeps."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    permutation = np.argsort(bits, kind='stable').astype(np.int32)
    permutation.flags.writeable = False
    return permutation


def train_indices(
    n: int, batch: int, seed: int, step: int, process: Process = (0, 1)
) -> Int32[np.ndarray, ' b']:
    """The examples of training step `step` (from 0): positions step·batch … of the epochs' stream.

    Of several processes, each gets its contiguous part of the global batch.

    Errors:
        UserError: The number of processes does not divide `batch`.
    """
    local = local_size(batch, process)
    start = step * batch + process[0] * local
    pieces = []
    while local:
        epoch, position = divmod(start, n)
        pieces.append(order(n, seed, epoch)[position : position + local])
        start += len(pieces[-1])
        local -= len(pieces[-1])
    return np.concatenate(pieces)


# Many classes have an order each; large ones take up few of these places, small ones little memory.
_order = functools.lru_cache(maxsize=4096)(order.__wrapped__)


def balanced_indices(
    by_class: Sequence[np.ndarray], batch: int, seed: int, step: int, process: Process = (0, 1)
) -> Int32[np.ndarray, ' b']:
    """The examples of training step `step` where each class is drawn equally often.

    Round r of the stream takes example r of the endless concatenation of each class's own
    permutations, the classes in a new order. So at any time two classes were drawn equally often,
    to within one, and so were two examples of a class.

    `by_class` are the positions of each class that has any; else as `train_indices`.
    """
    local, classes = local_size(batch, process), len(by_class)
    start = step * batch + process[0] * local
    index = np.empty(local, np.int32)
    for i in range(local):
        turn, place = divmod(start + i, classes)
        chosen = _order(classes, seed, turn)[place]
        own, key = by_class[chosen], seed + (int(chosen) + 1 << 32)  # seeds are below 2³²
        epoch, position = divmod(turn, len(own))
        index[i] = own[_order(len(own), key, epoch)[position]]
    return index


def eval_batches(n: int, batch: int, process: Process = (0, 1)) -> Iterator[Indices]:
    """`(index, mask)` of each evaluation batch; the last is filled up with index 0, mask False.

    Parts of processes, and errors, as in `train_indices`.
    """
    local = local_size(batch, process)
    for start in range(0, n, batch):
        position = start + process[0] * local + np.arange(local, dtype=np.int32)
        mask = position < n
        yield np.where(mask, position, 0).astype(np.int32), mask


def local_size(batch: int, process: Process) -> int:
    """The number of a global batch's examples on each process; a remainder is a `UserError`."""
    _, count = process
    if batch % count:
        raise UserError(
            f'a batch of {batch} examples cannot be divided among {count} processes; set '
            f'config.data.batch and config.data.eval_batch to multiples of {count}'
        )
    return batch // count


def load(
    source: Source, resize: str = 'none', size: int = 0, channels: int = 0
) -> UInt8[np.ndarray, 'n h w c']:
    """Decode and resize every image of `source`, on all cores.

    Sources that decode are decoded once: the pixels are kept in the user's cache folder, by the
    content, the other arguments, the rule of decoding and Pillow's version, and mapped from there.
    """
    import PIL

    shape = (len(source), *image_shape(source, resize, size, channels))

    def fill(images: np.ndarray) -> None:
        def one(i: int) -> None:
            images[i] = resize_image(source.read(i), resize, size, shape[-1])

        parallel_map(one, len(source), 'Decoding images')

    if source.encoded:
        key = digest(source.fingerprint, resize, str(shape), f'{RULE}', PIL.__version__)
        return cached_array(cache_folder() / 'images' / f'{key}.npy', shape, fill)
    images = np.empty(shape, np.uint8)
    fill(images)
    return images


def statistics(batches: Any) -> tuple[Float64[np.ndarray, ' c'], Float64[np.ndarray, ' c']]:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Computed from all images where their pixels fill at most 1 GiB (1.3 million of 28×28×1, 7,133 of
    224×224×3), else from the first that do, in a fixed shuffled order. Sums of integers are exact.
    A channel that hardly varies has a standard deviation of one grey level, 1/255.
    """
    height, width, channels = batches.image_shape
    count = min(batches.n, max(1, SAMPLE_BYTES // (height * width * channels)))
    chosen = np.sort(order(batches.n, 0, 0)[:count]) if count < batches.n else np.arange(batches.n)
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for start in range(0, count, SAMPLE_CHUNK):
        pixels = batches.read(chosen[start : start + SAMPLE_CHUNK]).reshape(-1, channels)
        total += pixels.sum(axis=0, dtype=np.int64)
        squares += np.square(pixels, dtype=np.uint16).sum(axis=0, dtype=np.int64)
    pixels = count * height * width
    mean = total / pixels
    variance = np.maximum(squares / pixels - mean**2, 1)
    return mean / 255, np.sqrt(variance) / 255


def open_batches(
    data: config.Data,
    which: str,
    *,
    source: Any = None,
    seed: int = 0,
    process: Process = (0, 1),
    sharding: NamedSharding | None = None,
) -> 'DeviceBatches | StreamBatches':
    """Open the provider of the training or evaluation batches.

    Args:
        data: Sets larger than `memory_gb` (10⁹ bytes, decoded) stream, unless `stream` decides.
        which, source: As in `open_split`.
        seed: The seed of the training order.
        process: Decides the contiguous part of every batch that this process reads.
        sharding: The layout of batches that are global arrays; without it, a batch is the
            process's own part, on the default device.

    Errors:
        UserError: A batch is larger than the data or the machine's memory, or the number of
            processes does not divide it.
    """
    source = open_split(data, which, source)
    batch = data.batch if which == 'train' else data.eval_batch or data.batch
    if which == 'train' and batch > len(source):
        raise UserError(
            f'config.data.batch is {batch}, but {source.name} has {len(source)} examples for '
            'training; lower it'
        )
    size = data.resize, data.size, data.channels
    shape = image_shape(source, *size)
    needed, has = batch * math.prod(shape), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if needed > has:
        raise UserError(
            f'{batch} images of {"×".join(map(str, shape))} take {needed / 1e9:,.0f} GB, and this '
            f'machine has {has / 1e9:,.0f}; lower config.data.size or config.data.batch'
        )
    fits = len(source) * math.prod(shape) <= data.memory_gb * 1e9
    on_device = data.stream == 'never' or (data.stream == 'auto' and fits)
    return (DeviceBatches if on_device else StreamBatches)(
        source,
        *size,
        batch=batch,
        seed=seed,
        balance=data.balance and which == 'train',
        process=process,
        sharding=sharding,
    )


def with_order(batches: Any, *, batch: int, seed: int = 0, balance: bool = False) -> Any:
    """The same images, shared, in batches of another size and in another order."""
    other = copy.copy(batches)
    other._batch, other._seed, other.balance = batch, seed, balance
    return other


class Batches:
    """The facts and options that all providers have in common, those of `open_batches`.

    `data` has the labels and facts of a `Source`.
    """

    streams: bool  # whether the next batch may have to be waited for

    def __init__(
        self,
        data: Any,
        image_shape: tuple[int, ...],
        *,
        batch: int,
        seed: int = 0,
        balance: bool = False,
        process: Process = (0, 1),
        sharding: NamedSharding | None = None,
    ):
        local_size(batch, process)  # refuses a batch that cannot be divided
        self._take(data)
        self.class_names, self.image_shape = data.class_names, image_shape
        self.skipped, self.notes = data.skipped, data.notes
        self._batch, self._seed, self._process = batch, seed, process
        self._sharding, self.balance = sharding, balance

    def _take(self, data: Any) -> None:
        """Serve the examples of `data`."""
        self._source = data
        for cached in ('moments', '_by_class'):
            self.__dict__.pop(cached, None)
        self.n, self.labels, self.fingerprint = len(data.labels), data.labels, data.fingerprint

    def describe(self, i: int) -> str:
        """The origin of an example: its file, if it has one."""
        return self._source.describe(int(i))

    @functools.cached_property
    def moments(self) -> tuple[Float64[np.ndarray, ' c'], Float64[np.ndarray, ' c']]:
        """Mean and standard deviation of each channel, as `statistics` computes them, once."""
        return statistics(self)

    def digests(self) -> list[bytes]:
        """The SHA-256 of the file of each image, else of its pixels: the same in any split."""
        if content := self._source.content:
            return [bytes.fromhex(content(i)) for i in range(self.n)]
        chunks = (np.arange(first, min(first + PART, self.n)) for first in range(0, self.n, PART))
        return [sha256(image).digest() for rows in chunks for image in self.read(rows)]

    def read(self, index: np.ndarray) -> UInt8[np.ndarray, 'k h w c']:
        """The images at the given positions, on the host."""
        raise NotImplementedError

    @functools.cached_property
    def _by_class(self) -> list[Int32[np.ndarray, ' k']]:
        return [np.flatnonzero(self.labels == k).astype(np.int32) for k in np.unique(self.labels)]

    def at(self, rows: np.ndarray) -> Any:
        """The batches of the examples at `rows`, in this order."""
        part = copy.copy(self)
        part._take(subset(self._source, rows, self._source.name))
        return part

    def train(self, start_step: int = 0) -> Iterator[Batch]:
        """The endless training batches from step `start_step` on."""
        return self._batches(lambda k: self._train_indices(start_step + k), sys.maxsize)

    def evaluate(self) -> Iterator[Batch]:
        """Each example once, the last batch padded."""
        indices = list(self._eval_indices())
        return self._batches(indices.__getitem__, len(indices))

    def _batches(self, indices: Callable[[int], Indices], count: int) -> Iterator[Batch]:
        """The batches of `indices(0)`, …, `indices(count − 1)`."""
        raise NotImplementedError

    def _train_indices(self, step: int) -> Indices:
        place = self._batch, self._seed, step, self._process
        if self.balance:
            index = balanced_indices(self._by_class, *place)
        else:
            index = train_indices(self.n, *place)
        return index, np.ones(len(index), bool)

    def _eval_indices(self) -> Iterator[Indices]:
        return eval_batches(self.n, self._batch, self._process)


class DeviceBatches(Batches):
    """Batches gathered from images that are put on the device once, on each of several devices."""

    streams = False

    def __init__(
        self, source: Source, resize: str = 'none', size: int = 0, channels: int = 0, **options: Any
    ):
        self._on_host = load(source, resize, size, channels)
        super().__init__(source, self._on_host.shape[1:], **options)
        sharding, gather = self._sharding, _gather
        if sharding:  # every device for itself: all images, its part of the indices
            whole, part = PartitionSpec(), sharding.spec
            in_specs = (whole, whole, part, part)
            gather = jax.shard_map(_gather, mesh=sharding.mesh, in_specs=in_specs, out_specs=part)
        self._gather = jax.jit(gather)
        self._on_device = self._once_put()

    def _once_put(self) -> Callable[[], Any]:
        """Puts images and labels on the device when they are first used there."""
        mesh = self._sharding and self._sharding.mesh
        everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else None
        host = self._on_host, self.labels
        return functools.cache(lambda: put(host, everywhere))

    def at(self, rows: np.ndarray) -> 'DeviceBatches':
        """The batches of the examples at `rows`, which are not decoded again."""
        part = super().at(rows)
        part._on_host = self._on_host[rows]
        part._on_device = part._once_put()
        return part

    def read(self, index: np.ndarray) -> UInt8[np.ndarray, 'k h w c']:
        return self._on_host[index]

    def _batches(self, indices: Callable[[int], Indices], count: int) -> Iterator[Batch]:
        for number in range(count):
            index_and_mask = indices(number)
            if self._sharding:  # else the jitted call takes them over, in a tenth of the time
                index_and_mask = put(index_and_mask, self._sharding)
            yield self._gather(*self._on_device(), *index_and_mask)


class StreamBatches(Batches):
    """Batches read, decoded and resized by Grain's threads, ahead of the step that needs them.

    The threads share the work in parts of `PART` images. So a first batch takes all cores, and what
    is alive at once depends on the batch and the cores, not on the source.
    """

    streams = True

    def __init__(
        self, source: Source, resize: str = 'none', size: int = 0, channels: int = 0, **options: Any
    ):
        super().__init__(source, image_shape(source, resize, size, channels), **options)
        self._resize = resize, size, self.image_shape[-1]

    def _read_image(self, i: int) -> UInt8[np.ndarray, 'h w c']:
        return resize_image(self._source.read(int(i)), *self._resize)

    def read(self, index: np.ndarray) -> UInt8[np.ndarray, 'k h w c']:
        return np.stack(
            parallel_map(lambda k: self._read_image(index[k]), len(index), 'Decoding images')
        )

    def _batches(self, indices: Callable[[int], Indices], count: int) -> Iterator[Batch]:
        # One is on its way to the device while the one before it is in use.
        following = None
        with contextlib.closing(self._read_ahead(indices, count)) as batches:
            for batch in batches:
                current, following = following, put(batch, self._sharding)
                del batch  # the host's copy, as soon as the device has its own
                if current is not None:
                    yield current
        if following is not None:
            yield following

    def _read_ahead(
        self, indices: Callable[[int], Indices], count: int
    ) -> Generator[dict[str, np.ndarray], None, None]:
        from grain import MapDataset, ReadOptions

        parts = -(-local_size(self._batch, self._process) // PART)  # of a batch
        indices = functools.lru_cache(64)(indices)  # once a batch, not once a part of it

        def read(part: int) -> np.ndarray:
            index, first = indices(part // parts)[0], part % parts * PART
            return np.stack([self._read_image(i) for i in index[first : first + PART]])

        def filled(index: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
            images = np.empty((len(index), *self.image_shape), np.uint8)
            for first in range(0, len(index), PART):
                images[first : first + PART] = next(done)
            return {'image': images, 'label': self.labels[index], 'index': index, 'mask': mask}

        whole = MapDataset.range(min(count * parts, sys.maxsize)).map(read)
        ahead = max(cores() + 1, 2 * parts)
        done = iter(whole.to_iter_dataset(ReadOptions(cores(), ahead)))
        with contextlib.closing(done):
            for number in range(count):
                yield filled(*indices(number))


def _gather(images: Array, labels: Array, index: Array, mask: Array) -> Batch:
    return {
        'image': images.at[index].get(mode='promise_in_bounds'),
        'label': labels.at[index].get(mode='promise_in_bounds'),
        'index': index,
        'mask': mask,
    }


def put(tree: Any, sharding: NamedSharding | None) -> Any:
    """Put the process's arrays on its device, or as its part of global ones."""
    if sharding is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
