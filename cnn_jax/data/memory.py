"""Whole sets decoded once and held as uint8 arrays, folders' and TFDS's in a mapped cache file."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

from cnn_jax.cache import cache_folder
from cnn_jax.data import cache
from cnn_jax.data.decode import RULE
from cnn_jax.data.parallel import parallel_map
from cnn_jax.data.resize import image_shape, prepare
from cnn_jax.data.source import Source, digest


@dataclass(frozen=True, eq=False)
class Arrays:
    """A decoded set. `fingerprint` is the source's: of the content, before any resizing."""

    images: UInt8[np.ndarray, 'n h w c']
    labels: Int32[np.ndarray, ' n']
    class_names: tuple[str, ...]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()


def load(source: Source, resize: str = 'none', size: int = 0, channels: int = 0) -> Arrays:
    """Every image of `source`, decoded and prepared on all cores.

    Sources that decode are decoded once: the pixels are kept in the user's cache folder, keyed
    by content, `resize`, `size`, `channels`, the rule of decoding and Pillow's version, and
    mapped from there. Damaged files there are made again.
    """
    import PIL

    height, width, channels = image_shape(source, resize, size, channels)
    shape = (len(source), height, width, channels)

    def fill(images: np.ndarray) -> None:
        def one(i: int) -> None:
            images[i] = prepare(source.read(i), resize, size, channels)

        parallel_map(one, len(source), 'Decoding images')

    if source.encoded:
        key = digest(source.fingerprint, resize, str(shape), f'{RULE}', PIL.__version__)
        images = cache.cached_array(cache_folder() / 'images' / f'{key}.npy', shape, fill)
    else:
        images = np.empty(shape, np.uint8)
        fill(images)
    return Arrays(images, source.labels, source.class_names, source.fingerprint, source.skipped)
