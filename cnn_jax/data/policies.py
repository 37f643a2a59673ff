"""RandAugment and TrivialAugment: operations drawn at random from one list, on 8-bit images.

The list is RandAugment's; grey images have no saturation to change. Deviations from the papers'
code: maps of the plane are sampled bilinearly instead of by the nearest pixel, and shears keep
the centre, not the corner; solarize starts from 256, so that level 0 changes nothing; what is
fractional is rounded, not truncated. What lies beyond the image is black, as in torchvision.

All operations of one kind are one computation with drawn arguments (one resampling, one blend),
for under `vmap` a choice costs the sum of what it chooses from.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from cnn_jax.data import colour, geometry, tone

Image = UInt8[Array, 'h w c']
Number = Float[Array, ''] | float


class Space(NamedTuple):
    """How strong each operation is at level 1; level 0 changes nothing."""

    degrees: float  # of a rotation
    shear: float
    share: float  # of the side: how far a translation goes
    pixels: float  # what it goes at most
    enhance: float  # 1 ± this: factor of brightness, saturation, contrast, sharpness
    bits: int  # dropped by posterize


RANDAUGMENT = Space(30, 0.3, 150 / 331, jnp.inf, 0.9, 4)  # torchvision's, from AutoAugment's
TRIVIALAUGMENT = Space(135, 0.99, 1, 32, 0.99, 6)  # the paper's wide space
LEVELS = 30  # magnitudes are 0 to 30

PLANE: dict[str, Callable] = {  # of the signed level, the space, and the sides
    'rotate': lambda s, space, h, w: geometry.rotation(s * space.degrees),
    'shear_x': lambda s, space, h, w: geometry.shear(0.0, s * space.shear),
    'shear_y': lambda s, space, h, w: geometry.shear(s * space.shear, 0.0),
    'translate_x': lambda s, space, h, w: geometry.shift(0.0, s * _far(space, w)),
    'translate_y': lambda s, space, h, w: geometry.shift(s * _far(space, h), 0.0),
}
ENHANCE = {
    'brightness': colour.black,
    'saturation': colour.grey,
    'contrast': colour.mean_grey,
    'sharpness': colour.smooth,
}
TONE: dict[str, Callable] = {  # of the image, the level and the space
    'posterize': lambda x, level, space: tone.posterize(x, _whole(level * space.bits)),
    'solarize': lambda x, level, space: tone.solarize(x, 256 * (1 - level)),
    'autocontrast': lambda x, level, space: tone.autocontrast(x),
    'equalize': lambda x, level, space: tone.equalize(x),
}


def operations(channels: int) -> tuple[str, ...]:
    """The list that an operation is drawn from."""
    names = ('identity', *PLANE, *ENHANCE, *TONE)
    return names if channels == 3 else tuple(name for name in names if name != 'saturation')


def rand_augment(key: Key[Array, ''], image: Image, count: int, magnitude: Number) -> Image:
    """`count` operations, each drawn uniformly, all of one magnitude, their signs random.

    Args:
        key: Of this image.
        image: 8-bit.
        count: n.
        magnitude: m, 0 to 30; autocontrast and equalize know none, so that m = 0 still changes.

    Source: Cubuk et al. 2020, "RandAugment"; magnitudes as in torchvision's `RandAugment`.
    """
    for one in jax.random.split(key, count):
        image = _drawn(one, image, magnitude / LEVELS, 1.0, RANDAUGMENT)
    return image


def trivial_augment(key: Key[Array, ''], image: Image, rate: Number = 1.0) -> Image:
    """One operation, drawn uniformly, of a magnitude drawn uniformly from 0, 1, … 30.

    Args:
        key: Of this image.
        image: 8-bit.
        rate: Probability that it happens; 0 changes no bit. The paper has 1.

    Source: Müller & Hutter 2021, "TrivialAugment", TA (Wide); as torchvision's
    `TrivialAugmentWide`.
    """
    of_level, of_rest = jax.random.split(key)
    magnitude = jax.random.randint(of_level, (), 0, LEVELS + 1).astype(jnp.float32)
    return _drawn(of_rest, image, magnitude / LEVELS, rate, TRIVIALAUGMENT)


def _drawn(key, image: Image, level: Number, rate: Number, space: Space) -> Image:
    names = operations(image.shape[-1])
    bits = jax.random.bits(key, (2,))
    chosen = (bits[0] % len(names)).astype(jnp.int32)
    sign = jnp.where(bits[1] % 2 == 1, 1.0, -1.0)
    happens = jax.random.uniform(jax.random.fold_in(key, 2)) < rate
    return jnp.where(happens, operate(image, chosen, level, sign, space), image)


def operate(
    image: Image, chosen: Int[Array, ''], level: Number, sign: Number, space: Space
) -> Image:
    """One operation.

    Args:
        image: 8-bit.
        chosen: Its place in `operations`.
        level: Its strength, 0 to 1.
        sign: 1 or −1: the direction in the plane, or whether a property is more or less.
        space: What level 1 is.
    """
    height, width, channels = image.shape
    number = {name: i for i, name in enumerate(operations(channels))}
    x = image.astype(jnp.float32)

    matrix = jnp.eye(2, 3)
    for name, make in PLANE.items():
        moved = make(sign * level, space, height, width)
        matrix = jnp.where(chosen == number[name], moved, matrix)
    result = _once(geometry.as_type(geometry.affine(x, _once(matrix)), image.dtype))

    without, factor = x, 1 + sign * level * space.enhance
    for name, remove in ENHANCE.items():
        if name in number:
            without = jnp.where(chosen == number[name], _once(remove(x)), without)
            enhanced = geometry.as_type(colour.blend(x, without, factor), image.dtype)
            result = jnp.where(chosen == number[name], enhanced, result)

    for name, change in TONE.items():
        toned = _once(change(image, level, space))
        result = jnp.where(chosen == number[name], toned, result)
    return result


def _once(x: Array) -> Array:
    """x, not computed again for each pixel of what is chosen from it: a third of the time."""
    return lax.optimization_barrier(x)


def _far(space: Space, side: int) -> float:
    return min(space.share * side, space.pixels)


def _whole(x: Number) -> Int[Array, '']:
    return jnp.round(x).astype(jnp.int32)
