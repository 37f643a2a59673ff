"""Brightness, contrast, saturation and sharpness of pixels in 0…255.

Each blends the image with a version that lacks the property:
y = f·x + (1 − f)·without(x), kept in 0…255; f = 1 is the identity, f > 1 exaggerates.

They act on pixels, before normalization: the bounds 0 and 255, and the black that brightness
blends with, mean nothing in normalized units.

Source: torchvision's `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and
`adjust_sharpness` on float images; Pillow's `ImageEnhance` for all four.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Image = Float[Array, 'h w c']

JITTERS = 'brightness', 'contrast', 'saturation'
GREY = 0.2989, 0.587, 0.114  # ITU-R BT.601, with torchvision's digits


def jitter(
    key: Key[Array, ''],
    x: Image,
    brightness: Float[Array, ''] | float | None = None,
    contrast: Float[Array, ''] | float | None = None,
    saturation: Float[Array, ''] | float | None = None,
) -> Image:
    """Random brightness, contrast and saturation, in this order.

    The factor of each is uniform in [max(0, 1 − strength), 1 + strength]; strength 0 changes no
    bit. Grey images have no saturation.

    Args:
        key: Of this image.
        x: Pixels, 0 to 255.
        brightness, contrast, saturation: Strengths, ≥ 0; None is off.

    Source: torchvision's `ColorJitter`, which draws the order, too.
    """
    draws = jax.random.uniform(key, (3,))
    changes = [(black, brightness), (mean_grey, contrast), (grey, saturation)]
    for draw, (without, strength) in zip(draws, changes):
        if strength is None or (without is grey and x.shape[-1] == 1):
            continue
        strength = jnp.asarray(strength, jnp.float32)
        low = jnp.maximum(1 - strength, 0)
        x = blend(x, without(x), low + draw * (1 + strength - low))
    return x


def blend(x: Image, without: Image, factor: Float[Array, ''] | float) -> Image:
    """f·x + (1 − f)·without, kept in 0…255."""
    return jnp.clip(factor * x + (1 - factor) * without, 0, 255)


def black(x: Image) -> Image:
    """No brightness."""
    return jnp.zeros_like(x)


def grey(x: Image) -> Image:
    """No saturation: 0.2989·R + 0.587·G + 0.114·B in every channel; grey images stay."""
    if x.shape[-1] == 1:
        return x
    return jnp.broadcast_to((x * jnp.array(GREY)[None, None]).sum(-1, keepdims=True), x.shape)


def mean_grey(x: Image) -> Image:
    """No contrast: the mean of the grey image, everywhere."""
    return jnp.broadcast_to(grey(x)[..., :1].mean(), x.shape)


def smooth(x: Image) -> Image:
    """No sharpness: the mean of 3×3 pixels, the middle one five times; border pixels stay."""
    height, width, _ = x.shape
    around = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    rows = around[:-2] + around[1:-1] + around[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    return jnp.where(inner, total / 13, x)
