"""Random changes to training images, on the device, keyed by example.

The key of an example depends on its index and not on its place in a batch, so an image is changed
in the same way whatever the batch size, the process or the device that it lands on.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key, Num, UInt8

from cnn_jax.config import Augment
from cnn_jax.data import colour, geometry, policies
from cnn_jax.data.erasing import Erasing, erase

# Each draws from a key of its own, so none depends on whether the others are on. A number is
# part of every result ever reported; flip, crop and cutout share the key without one.
STREAMS = {
    'rotation': 16,
    'erasing': 17,
    'colour': 18,
    'randaugment': 19,
    'trivialaugment': 20,
    'mix': 21,
}


def shown(
    on: Augment,
    strengths: Augment,
    key: Key[Array, ''],
    images: UInt8[Array, 'b h w c'],
    index: Int32[Array, ' b'],
    prepare: Callable[[UInt8[Array, 'b h w c']], Float[Array, 'b h w d']],
) -> Float[Array, 'b h w d']:
    """What the network is shown of images: colours changed, prepared, then changed in the plane.

    Colour, and the policies, act on 8-bit pixels; flip, rotation, crop, cutout and erasing on
    normalized ones, where the mean that they fill with is 0.

    Args:
        on: Says which changes are on.
        strengths: The same with traced values.
        key: Folded with the seed and the step, not with anything of the batch.
        images: As the source has them.
        index: The examples' positions in the source.
        prepare: From uint8 images to the network's floats.
    """
    images = prepare(recoloured(on, strengths, key, images, index))
    erasing = Erasing(
        strengths.erasing, strengths.erase_least, strengths.erase_most, strengths.erase_aspect
    )
    return augment(
        key,
        images,
        index,
        flip=on.flip,
        crop=on.crop,
        cutout=on.cutout,
        rotation=strengths.rotation if on.rotation else None,
        erasing=erasing if on.erasing else None,
    )


def recoloured(
    on: Augment,
    strengths: Augment,
    key: Key[Array, ''],
    images: UInt8[Array, 'b h w c'],
    index: Int32[Array, ' b'],
) -> UInt8[Array, 'b h w c']:
    """8-bit images after RandAugment, TrivialAugment and colour jitter; arguments as in `shown`."""

    def one(image, index):
        if on.randaugment:
            k = example_key(key, index, 'randaugment')
            image = policies.rand_augment(
                k, image, on.randaugment_operations, strengths.randaugment
            )
        if on.trivialaugment:
            k = example_key(key, index, 'trivialaugment')
            image = policies.trivial_augment(k, image, strengths.trivialaugment)
        if any(getattr(on, name) for name in colour.JITTERS):
            k = example_key(key, index, 'colour')
            chosen = {n: getattr(strengths, n) for n in colour.JITTERS if getattr(on, n)}
            pixels = colour.jitter(k, image.astype(jnp.float32), **chosen)
            image = geometry.as_type(pixels, image.dtype)
        return image

    return jax.vmap(one)(images, index)


def augment(
    key: Key[Array, ''],
    images: Num[Array, 'b h w c'],
    index: Int32[Array, ' b'],
    *,
    flip: bool = False,
    crop: int = 0,
    cutout: int = 0,
    rotation: Float[Array, ''] | float | None = None,
    erasing: Erasing | None = None,
    fill: Num[Array, ' c'] | float = 0,
) -> Num[Array, 'b h w c']:
    """Flip, rotation, pad-and-crop, cutout, erasing, in this order; what is off costs nothing.

    - flip: with probability 1/2.
    - rotation: about the centre, by an angle uniform in ±rotation, bilinear, corners `fill`.
    - crop: pad by `crop` pixels on each side, then cut a window of the old size at a uniformly
      random place (He et al. 2016, Deep residual learning, section 4.2).
    - cutout: a square of side `cutout` pixels, its centre uniform over the image, cut off at the
      borders, becomes `fill` (DeVries & Taylor 2017, Improved regularization of CNNs with cutout).
    - erasing: see `cnn_jax.data.erasing`.

    Args:
        key: Folded with the seed and the step, not with anything of the batch.
        images: uint8 or float; normalized ones for the published zero padding.
        index: The examples' positions in the source.
        flip: Whether to flip at all.
        crop: Padding, in pixels.
        cutout: Side of the square, in pixels.
        rotation: Largest angle, in degrees; 0 changes no bit, None is off.
        erasing: Its numbers; a rate of 0 changes no bit, None is off.
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
        if rotation is not None:
            image = _rotated(example_key(key, index, 'rotation'), image, rotation, fill)
        if crop:
            image = _crop(bits[1], bits[2], image, crop, fill)
        if cutout:
            image = _cut_out(bits[3], bits[4], image, cutout, fill)
        if erasing is not None:
            image = erase(example_key(key, index, 'erasing'), image, erasing, fill)
        return image

    return jax.vmap(one)(images, index)


def example_key(key: Key[Array, ''], index: Int32[Array, ''], stream: str) -> Key[Array, '']:
    """The key of one example for one of `STREAMS`."""
    return jax.random.fold_in(jax.random.fold_in(key, index), STREAMS[stream])


def _rotated(key: Array, image: Array, degrees, fill: Array) -> Array:
    angle = degrees * (2 * jax.random.uniform(key) - 1)
    return geometry.affine(image, geometry.rotation(angle), fill)


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
