"""Operations on single images, and RandAugment and TrivialAugment, which draw from them.

The list of operations is RandAugment's; grey images have no saturation to change. Deviations from
the papers' code: maps of the plane are sampled bilinearly instead of by the nearest pixel, and
shears keep the centre, not the corner; solarize starts from 256, so that level 0 changes nothing;
fractions are rounded, not truncated. Operations of one kind are one computation with drawn
arguments, for under `vmap` a choice costs the sum of what it chooses from.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num, UInt8

Image = UInt8[Array, 'h w c']
Pixels = Float[Array, 'h w c']  # 0 to 255
Number = Float[Array, ''] | float


def affine(image: Num[Array, 'h w c'], matrix: Float[Array, '2 3']) -> Num[Array, 'h w c']:
    """Resample an image along an affine map about its centre.

    y[r, c] = x(centre + M·(r, c, 1)ᵀ), with r and c measured from the centre, in pixels

    Between pixels x is bilinear; beyond the image it is 0, which the border pixels fade to over
    the width of a pixel. The identity changes no bit; integers are rounded to the nearest.
    """
    height, width, channels = image.shape
    padded = jnp.pad(image.astype(jnp.float32), ((1, 1), (1, 1), (0, 0))).reshape(-1, channels)
    middle = (height - 1) / 2, (width - 1) / 2
    r = jnp.arange(height, dtype=jnp.float32)[:, None] - middle[0]
    c = jnp.arange(width, dtype=jnp.float32)[None, :] - middle[1]
    top, down = _neighbours(matrix[0, 0] * r + matrix[0, 1] * c + matrix[0, 2] + middle[0], height)
    left, right = _neighbours(matrix[1, 0] * r + matrix[1, 1] * c + matrix[1, 2] + middle[1], width)

    def at(row, column):
        return padded.at[row * (width + 2) + column].get(mode='promise_in_bounds')

    down, right = down[..., None], right[..., None]
    upper = (1 - right) * at(top, left) + right * at(top, left + 1)
    lower = (1 - right) * at(top + 1, left) + right * at(top + 1, left + 1)
    return as_type((1 - down) * upper + down * lower, image.dtype)


def _neighbours(position: Array, size: int) -> tuple[Array, Array]:
    """The padded image's pixel before a position, and the distance from it, 0 to 1."""
    position = jnp.clip(position + 1, 0, size + 1)
    before = jnp.minimum(jnp.floor(position), size)
    return before.astype(jnp.int32), position - before


def rotation(degrees: Float[Array, '']) -> Float[Array, '2 3']:
    """The matrix that turns an image anticlockwise about its centre."""
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    sin, cos, zero = jnp.sin(angle), jnp.cos(angle), jnp.zeros((), jnp.float32)
    return jnp.stack([jnp.stack([cos, sin, zero]), jnp.stack([-sin, cos, zero])])


def shift(rows: Number, columns: Number) -> Float[Array, '2 3']:
    """The matrix that moves an image up and to the left, in pixels."""
    return jnp.eye(2, 3).at[:, 2].set(jnp.stack([jnp.float32(rows), jnp.float32(columns)]))


def shear(rows: Number, columns: Number) -> Float[Array, '2 3']:
    """The matrix that moves a row by `columns` pixels for each row below the centre, or columns."""
    return jnp.eye(2, 3).at[0, 1].set(jnp.float32(rows)).at[1, 0].set(jnp.float32(columns))


def as_type(x: Float[Array, '...'], dtype) -> Num[Array, '...']:
    """Convert to another type; for an integer type, round and clip to its range."""
    if not jnp.issubdtype(dtype, jnp.integer):
        return x.astype(dtype)
    limits = jnp.iinfo(dtype)
    return jnp.clip(jnp.round(x), limits.min, limits.max).astype(dtype)


GREY = 0.2989, 0.587, 0.114  # ITU-R BT.601, with torchvision's digits


def jitter(
    key: Key[Array, ''],
    x: Pixels,
    brightness: Number | None = None,
    contrast: Number | None = None,
    saturation: Number | None = None,
) -> Pixels:
    """Random brightness, contrast and saturation, in this order (torchvision's is drawn, too).

    The factor of each is uniform in [max(0, 1 − strength), 1 + strength]; strength 0 changes no
    bit. Grey images have no saturation.
    """
    draws = jax.random.uniform(key, (3,))
    changes = [(jnp.zeros_like, brightness), (mean_grey, contrast), (grey, saturation)]
    for draw, (without, strength) in zip(draws, changes):
        if strength is None or (without is grey and x.shape[-1] == 1):
            continue
        strength = jnp.asarray(strength, jnp.float32)
        low = jnp.maximum(1 - strength, 0)
        x = blend(x, without(x), low + draw * (1 + strength - low))
    return x


def blend(x: Pixels, without: Pixels, factor: Number) -> Pixels:
    """f·x + (1 − f)·without, clipped to 0…255; f = 1 is the identity, f > 1 exaggerates.

    `without` is the image without brightness (zeros), contrast (`mean_grey`), saturation (`grey`)
    or sharpness (`smooth`).

    Source: torchvision's `adjust_brightness` etc. on float images; Pillow's `ImageEnhance`.
    """
    return jnp.clip(factor * x + (1 - factor) * without, 0, 255)


def grey(x: Pixels) -> Pixels:
    """The image without saturation: 0.2989·R + 0.587·G + 0.114·B in every channel."""
    if x.shape[-1] == 1:
        return x
    return jnp.broadcast_to((x * jnp.array(GREY)[None, None]).sum(-1, keepdims=True), x.shape)


def mean_grey(x: Pixels) -> Pixels:
    """The image without contrast: the mean of the grey image, everywhere."""
    return jnp.broadcast_to(grey(x)[..., :1].mean(), x.shape)


def smooth(x: Pixels) -> Pixels:
    """The image without sharpness: means of 3×3 pixels, the middle one 5 times; borders stay."""
    height, width, _ = x.shape
    around = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    rows = around[:-2] + around[1:-1] + around[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    return jnp.where(inner, total / 13, x)


def posterize(x: Image, dropped: Array | int) -> Image:
    """Set the lowest bits of each pixel, 0 to 8 of them, to zero."""
    dropped = jnp.asarray(dropped, jnp.int32)
    return (x.astype(jnp.int32) >> dropped << dropped).astype(jnp.uint8)


def solarize(x: Image, threshold: Array | float) -> Image:
    """Invert the pixels from a threshold on: x < t ? x : 255 − x; t = 256 is the identity."""
    return jnp.where(x.astype(jnp.float32) < threshold, x, 255 - x)


def autocontrast(x: Image) -> Image:
    """Stretch each channel to 0…255: ⌊255·(x − low) / (high − low)⌋; a constant one stays."""
    pixels = x.astype(jnp.int32)
    low, high = (f(pixels, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    stretched = 255 * (pixels - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, pixels).astype(jnp.uint8)


def equalize(x: Image) -> Image:
    """Spread the grey levels of each channel evenly, by their cumulative histogram H.

    y = ⌊(H(x − 1) + ⌊s/2⌋) / s⌋,  s = ⌊(pixels − count of the highest level) / 255⌋

    H(x − 1) counts the pixels darker than x. Where s is 0 the channel stays as it is.
    """
    channels = x.shape[-1]
    # One table of all channels: a level's position in it is 256·channel + level.
    position = x.reshape(-1, channels).astype(jnp.int32) + 256 * jnp.arange(channels)[None]
    count = jnp.zeros(256 * channels, jnp.int32).at[position].add(1, mode='promise_in_bounds')
    count = count.reshape(channels, 256)
    darker = jnp.cumsum(count, axis=1) - count
    step = darker.max(axis=1, keepdims=True, where=count > 0, initial=0) // 255
    curve = jnp.minimum((darker + step // 2) // jnp.maximum(step, 1), 255)
    curve = jnp.where(step > 0, curve, jnp.arange(256)[None]).astype(jnp.uint8)
    return curve.reshape(-1).at[position].get(mode='promise_in_bounds').reshape(x.shape)


class Space(NamedTuple):
    """The strength of each operation at level 1; level 0 changes nothing."""

    degrees: float  # of a rotation
    shear: float
    fraction: float  # of the side: the distance of a translation
    pixels: float  # its largest distance
    enhance: float  # 1 ± this: factor of brightness, saturation, contrast, sharpness
    bits: int  # dropped by posterize


RANDAUGMENT = Space(30, 0.3, 150 / 331, jnp.inf, 0.9, 4)  # torchvision's, from AutoAugment's
TRIVIALAUGMENT = Space(135, 0.99, 1, 32, 0.99, 6)  # the paper's wide space
LEVELS = 30  # magnitudes are 0 to 30

PLANE: dict[str, Callable] = {  # functions of the signed level, the space, and the sides
    'rotate': lambda s, space, h, w: rotation(s * space.degrees),
    'shear_x': lambda s, space, h, w: shear(0.0, s * space.shear),
    'shear_y': lambda s, space, h, w: shear(s * space.shear, 0.0),
    'translate_x': lambda s, space, h, w: shift(0.0, s * min(space.fraction * w, space.pixels)),
    'translate_y': lambda s, space, h, w: shift(s * min(space.fraction * h, space.pixels), 0.0),
}
ENHANCE: dict[str, Callable] = {
    **{'brightness': jnp.zeros_like, 'saturation': grey},
    **{'contrast': mean_grey, 'sharpness': smooth},
}
TONE: dict[str, Callable] = {  # functions of the image, the level and the space
    'posterize': lambda x, level, space: posterize(x, jnp.round(level * space.bits)),
    'solarize': lambda x, level, space: solarize(x, 256 * (1 - level)),
    'autocontrast': lambda x, level, space: autocontrast(x),
    'equalize': lambda x, level, space: equalize(x),
}


def operations(channels: int) -> tuple[str, ...]:
    """The names of the operations that are drawn from, for images of so many channels."""
    names = ('identity', *PLANE, *ENHANCE, *TONE)
    return names if channels == 3 else tuple(name for name in names if name != 'saturation')


def rand_augment(key: Key[Array, ''], image: Image, count: int, magnitude: Number) -> Image:
    """Apply `count` operations, drawn uniformly, all of one magnitude, their signs random.

    Autocontrast and equalize have no magnitude, so that 0 of 30 still changes.

    Source: Cubuk et al. 2020, "RandAugment"; magnitudes as in torchvision's `RandAugment`.
    """
    for one in jax.random.split(key, count):
        image = _apply_random(one, image, magnitude / LEVELS, 1.0, RANDAUGMENT)
    return image


def trivial_augment(key: Key[Array, ''], image: Image, rate: Number = 1.0) -> Image:
    """Apply one operation, drawn uniformly, of a magnitude drawn uniformly from 0, 1, … 30.

    It happens with probability `rate`; the paper has 1.

    Source: Müller & Hutter 2021, "TrivialAugment", TA (Wide); as torchvision's
    `TrivialAugmentWide`.
    """
    k_level, k_rest = jax.random.split(key)
    magnitude = jax.random.randint(k_level, (), 0, LEVELS + 1).astype(jnp.float32)
    return _apply_random(k_rest, image, magnitude / LEVELS, rate, TRIVIALAUGMENT)


def _apply_random(key, image: Image, level: Number, rate: Number, space: Space) -> Image:
    names = operations(image.shape[-1])
    bits = jax.random.bits(key, (2,))
    chosen = (bits[0] % len(names)).astype(jnp.int32)
    sign = jnp.where(bits[1] % 2 == 1, 1.0, -1.0)
    happens = jax.random.uniform(jax.random.fold_in(key, 2)) < rate
    return jnp.where(happens, operate(image, chosen, level, sign, space), image)


def operate(
    image: Image, chosen: Int[Array, ''], level: Number, sign: Number, space: Space
) -> Image:
    """Apply the operation of that position in `operations`.

    Its strength is `level`, 0 to 1, of the `space`; a sign of −1 reverses its direction.
    """
    height, width, channels = image.shape
    number = {name: i for i, name in enumerate(operations(channels))}
    x = image.astype(jnp.float32)

    matrix = jnp.eye(2, 3)
    for name, make in PLANE.items():
        moved = make(sign * level, space, height, width)
        matrix = jnp.where(chosen == number[name], moved, matrix)
    result = _once(as_type(affine(x, _once(matrix)), image.dtype))

    without, factor = x, 1 + sign * level * space.enhance
    for name, remove in ENHANCE.items():
        if name in number:
            without = jnp.where(chosen == number[name], _once(remove(x)), without)
            enhanced = as_type(blend(x, without, factor), image.dtype)
            result = jnp.where(chosen == number[name], enhanced, result)

    for name, change in TONE.items():
        toned = _once(change(image, level, space))
        result = jnp.where(chosen == number[name], toned, result)
    return result


def _once(x: Array) -> Array:
    """x, computed once and not for each pixel that is selected from it: a third of the time."""
    return lax.optimization_barrier(x)
