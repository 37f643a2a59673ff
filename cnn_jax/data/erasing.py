"""Random erasing: a rectangle of random size and shape loses its content."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

Number = Float[Array, ''] | float


class Erasing(NamedTuple):
    """Of random erasing, all numbers; defaults are the paper's."""

    rate: Number = 0.5  # probability that an image is erased at all
    least: Number = 0.02  # area, as a share of the image's
    most: Number = 0.4
    aspect: Number = 0.3  # least height : width; the largest is its inverse


def erase(
    key: Key[Array, ''],
    image: Num[Array, 'h w c'],
    erasing: Erasing,
    fill: Num[Array, '1 1 c'],
) -> Num[Array, 'h w c']:
    """With a probability, sets a rectangle to the mean.

    height = √(s·h·w·a), width = √(s·h·w / a), rounded; s ~ U(least, most),
    log a ~ U(log aspect, −log aspect), its place uniform over where it fits

    Deviations: the paper draws again until the rectangle fits, here a is drawn from where it
    does; a is log-uniform as in torchvision, so that tall and wide are equally likely; the
    paper's variant RE-M (the mean), for random pixels have no right scale in all
    preprocessings.

    Source: Zhong et al. 2020, "Random erasing data augmentation".
    """
    height, width, _ = image.shape
    happens, size, shape, vertical, horizontal = jax.random.uniform(key, (5,))
    share = jnp.maximum(erasing.least + size * (erasing.most - erasing.least), 1e-6)
    low = jnp.log(jnp.maximum(erasing.aspect, share * height / width))
    high = jnp.log(jnp.minimum(1 / erasing.aspect, height / (share * width)))
    aspect = jnp.exp(low + shape * (high - low))
    area = share * height * width
    tall = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 0, height)
    wide = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 0, width)
    top = jnp.floor(vertical * (height - tall + 1))
    left = jnp.floor(horizontal * (width - wide + 1))
    row = jnp.arange(height, dtype=jnp.float32)[:, None, None]
    column = jnp.arange(width, dtype=jnp.float32)[None, :, None]
    inside = (top <= row) & (row < top + tall) & (left <= column) & (column < left + wide)
    return jnp.where(inside & (happens < erasing.rate), fill, image)
