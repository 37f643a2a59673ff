"""Affine maps of an image about its centre, sampled bilinearly."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def affine(
    image: Num[Array, 'h w c'], matrix: Float[Array, '2 3'], fill: Num[Array, '1 1 c'] | float = 0
) -> Num[Array, 'h w c']:
    """Each pixel becomes what lies where the matrix sends it.

    y[r, c] = x(centre + M·(r, c, 1)ᵀ), with r and c measured from the centre

    Between pixels x is bilinear; beyond the image it is `fill`, which the border pixels fade to
    over the width of a pixel. The identity changes no bit.

    Args:
        image: Integers are rounded to the nearest.
        matrix: From places in the result to places in the image, (row, column), in pixels.
        fill: A value for each channel, in the image's units.
    """
    height, width, channels = image.shape
    x = image.astype(jnp.float32)
    fill = jnp.broadcast_to(jnp.asarray(fill, jnp.float32), (1, 1, channels))
    padded = jnp.broadcast_to(fill, (height + 2, width + 2, channels))
    padded = padded.at[1:-1, 1:-1].set(x).reshape(-1, channels)

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


def _neighbours(place: Array, size: int) -> tuple[Array, Array]:
    """The padded image's pixel before a place, and how far beyond it the place is, 0 to 1."""
    place = jnp.clip(place + 1, 0, size + 1)
    before = jnp.minimum(jnp.floor(place), size)
    return before.astype(jnp.int32), place - before


def rotation(degrees: Float[Array, '']) -> Float[Array, '2 3']:
    """The matrix that turns an image anticlockwise about its centre."""
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    sin, cos, zero = jnp.sin(angle), jnp.cos(angle), jnp.zeros((), jnp.float32)
    return jnp.stack([jnp.stack([cos, sin, zero]), jnp.stack([-sin, cos, zero])])


def shift(rows: Float[Array, ''] | float, columns: Float[Array, ''] | float) -> Float[Array, '2 3']:
    """The matrix that moves an image up and to the left, in pixels."""
    return jnp.eye(2, 3).at[:, 2].set(jnp.stack([jnp.float32(rows), jnp.float32(columns)]))


def shear(rows: Float[Array, ''] | float, columns: Float[Array, ''] | float) -> Float[Array, '2 3']:
    """The matrix that moves a row by `columns` pixels for each row below the centre, or columns."""
    return jnp.eye(2, 3).at[0, 1].set(jnp.float32(rows)).at[1, 0].set(jnp.float32(columns))


def as_type(x: Float[Array, '...'], dtype) -> Num[Array, '...']:
    """In another type; to an integer it is rounded and kept in its range."""
    if not jnp.issubdtype(dtype, jnp.integer):
        return x.astype(dtype)
    limits = jnp.iinfo(dtype)
    return jnp.clip(jnp.round(x), limits.min, limits.max).astype(dtype)
