"""Random changes to training images, on the device, keyed by example.

The key of an example depends on its index and not on its place in a batch, so an image is changed
in the same way whatever the batch size, the process or the device that it lands on.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Key, Num

from cnn_jax.config import Augment


def augment(
    key: Key[Array, ''],
    images: Num[Array, 'b h w c'],
    index: Int32[Array, ' b'],
    *,
    flip: bool = False,
    crop: int = 0,
    cutout: int = 0,
    fill: Num[Array, ' c'] | float = 0,
) -> Num[Array, 'b h w c']:
    """Left-right flip, then pad-and-crop, then cutout; what is off changes nothing.

    - flip: with probability 1/2.
    - crop: pad by `crop` pixels on each side, then cut a window of the old size at a uniformly
      random place (He et al. 2016, Deep residual learning, section 4.2).
    - cutout: a square of side `cutout` pixels, its centre uniform over the image, cut off at the
      borders, becomes `fill` (DeVries & Taylor 2017, Improved regularization of CNNs with cutout).

    Args:
        key: Folded with the seed and the step, not with anything of the batch.
        images: uint8 or float; normalized ones for the published zero padding.
        index: The examples' positions in the source.
        flip: Whether to flip at all.
        crop: Padding, in pixels.
        cutout: Side of the square, in pixels.
        fill: The channel mean in the images' units, a number or one a channel; of normalized
            images it is 0.

    Returns:
        Images of the same shape and type.
    """
    fill = jnp.broadcast_to(jnp.asarray(fill, images.dtype), (1, 1, images.shape[-1]))

    def one(image, index):
        # Each change has bits of its own, so none depends on whether the others are on.
        bits = jax.random.bits(jax.random.fold_in(key, index), (5,))
        if flip:
            image = jnp.where(bits[0] % 2 == 1, image[:, ::-1], image)
        if crop:
            image = _crop(bits[1], bits[2], image, crop, fill)
        if cutout:
            image = _cut_out(bits[3], bits[4], image, cutout, fill)
        return image

    return jax.vmap(one)(images, index)


def augmented(
    config: Augment, key: Key[Array, ''], images: Num[Array, 'b h w c'], index: Int32[Array, ' b']
) -> Num[Array, 'b h w c']:
    """Normalized images, changed as a config says; arguments as in `augment`."""
    return augment(key, images, index, flip=config.flip, crop=config.crop, cutout=config.cutout)


def _crop(row_bits: Array, column_bits: Array, image: Array, pad: int, fill: Array) -> Array:
    height, width, channels = image.shape
    padded = jnp.broadcast_to(fill, (height + 2 * pad, width + 2 * pad, channels))
    padded = lax.dynamic_update_slice(padded, image, (pad, pad, 0))
    top, left = _below(2 * pad + 1, row_bits), _below(2 * pad + 1, column_bits)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _cut_out(row_bits: Array, column_bits: Array, image: Array, side: int, fill: Array) -> Array:
    height, width, _ = image.shape
    top, left = _below(height, row_bits) - side // 2, _below(width, column_bits) - side // 2
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (top <= row) & (row < top + side) & (left <= column) & (column < left + side)
    return jnp.where(inside, fill, image)


def _below(n: int, bits: Array) -> Array:
    """Uniform in 0…n−1, with a bias of at most n/2³²."""
    return (bits % n).astype(jnp.int32)
