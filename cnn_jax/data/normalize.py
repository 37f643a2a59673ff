"""Per-channel normalization, with the statistics of the training split."""

from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from cnn_jax.data.order import order

SAMPLE_BYTES = 2**30  # decoded pixels that the statistics are taken from, at most
CHUNK = 1024  # images read at once, so that memory stays flat


class Readable(Protocol):
    """What `statistics` needs of a provider of batches."""

    n: int
    image_shape: tuple[int, ...]

    def read(self, index: np.ndarray) -> np.ndarray: ...


def statistics(
    batches: Readable,
) -> tuple[Float64[np.ndarray, ' c'], Float64[np.ndarray, ' c']]:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Taken from all images where their pixels fill at most 1 GiB (1.3 million of 28×28×1, 7,133 of
    224×224×3), else from the first that do, in a fixed shuffled order: the same numbers whether
    the set streams or not, whatever the seed, the batch or the machine. Sums of integers are
    exact. A channel that hardly varies has a standard deviation of one grey level, 1/255.
    """
    height, width, channels = batches.image_shape
    count = min(batches.n, max(1, SAMPLE_BYTES // (height * width * channels)))
    chosen = np.sort(order(batches.n, 0, 0)[:count]) if count < batches.n else np.arange(batches.n)
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for start in range(0, count, CHUNK):
        pixels = batches.read(chosen[start : start + CHUNK]).reshape(-1, channels)
        total += pixels.sum(axis=0, dtype=np.int64)
        squares += np.square(pixels, dtype=np.uint16).sum(axis=0, dtype=np.int64)
    pixels = count * height * width
    mean = total / pixels
    variance = np.maximum(squares / pixels - mean**2, 1)
    return mean / 255, np.sqrt(variance) / 255


def normalize(
    images: UInt8[Array, 'b h w c'],
    mean: Float[Array, ' c'],
    std: Float[Array, ' c'],
    dtype=jnp.float32,
) -> Float[Array, 'b h w c']:
    """(x/255 − mean) / std, with mean and std of pixels in [0, 1]; computed in float32."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    scale, shift = 1 / (255 * std), mean / std
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)
