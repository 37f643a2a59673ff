"""Tone curves of 8-bit images: what Pillow's `ImageOps` calls by the same names."""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

Image = UInt8[Array, 'h w c']


def posterize(x: Image, dropped: Int[Array, ''] | int) -> Image:
    """Sets the lowest bits of each pixel, 0 to 8 of them, to zero."""
    dropped = jnp.asarray(dropped, jnp.int32)
    return (x.astype(jnp.int32) >> dropped << dropped).astype(jnp.uint8)


def solarize(x: Image, threshold: Array | float) -> Image:
    """Inverts the pixels from a threshold on: x < t ? x : 255 − x; t = 256 is the identity."""
    return jnp.where(x.astype(jnp.float32) < threshold, x, 255 - x)


def autocontrast(x: Image) -> Image:
    """Stretches each channel to 0…255: ⌊255·(x − low) / (high − low)⌋; a constant one stays."""
    pixels = x.astype(jnp.int32)
    low, high = (f(pixels, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    stretched = 255 * (pixels - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, pixels).astype(jnp.uint8)


def equalize(x: Image) -> Image:
    """Spreads the grey levels of each channel evenly, by their cumulative histogram H.

    y = ⌊(H(x − 1) + ⌊s/2⌋) / s⌋,  s = ⌊(pixels − count of the highest level) / 255⌋

    H(x − 1) counts the pixels darker than x. Where s is 0 the channel stays as it is.
    """
    channels = x.shape[-1]
    # One table of all channels: a level's place in it is 256·channel + level.
    place = x.reshape(-1, channels).astype(jnp.int32) + 256 * jnp.arange(channels)[None]
    count = jnp.zeros(256 * channels, jnp.int32).at[place].add(1, mode='promise_in_bounds')
    count = count.reshape(channels, 256)
    darker = jnp.cumsum(count, axis=1) - count
    step = darker.max(axis=1, keepdims=True, where=count > 0, initial=0) // 255
    curve = jnp.minimum((darker + step // 2) // jnp.maximum(step, 1), 255)
    curve = jnp.where(step > 0, curve, jnp.arange(256)[None]).astype(jnp.uint8)
    return curve.reshape(-1).at[place].get(mode='promise_in_bounds').reshape(x.shape)
