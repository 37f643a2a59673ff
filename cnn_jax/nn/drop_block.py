"""Dropout of squares of the feature map."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from cnn_jax.nn.bits import random_bits
from cnn_jax.nn.stored import stored

_LEVELS = 2**24  # a seed is rare, so its probability needs more digits than a rate


def drop_block(
    key: Key[Array, ''], x: Float[Array, 'b h w c'], rate: float | Float[Array, ''], side: int = 7
) -> Float[Array, 'b h w c']:
    """Sets k×k squares of each channel to zero and scales the rest to make up for it.

    y = x · m · count(m) / Σm,   γ = r/k² · h·w / ((h − k + 1)·(w − k + 1))

    Each position at which a square fits becomes the corner of a dropped one with probability γ; m
    is 0 in their union, and its count runs over the whole batch. Squares overlap, so the share
    dropped stays below r: pixel (i,j), on which n positions bear, is kept with probability
    (1 − γ)ⁿ. Rate 0 is the identity, bit for bit; if all is dropped, y is 0.

    Args:
        key: Random key; the same key gives the same mask.
        x: Feature maps.
        rate: r, 0 to 1; traced or not, the computation is the same. γ is at most 1.
        side: k, in pixels; clipped to the height and the width.

    Source: Ghiasi et al. 2018, "DropBlock", algorithm 1, with a mask for each channel. There a
    seed is the centre of its square, which for odd k is the same distribution.
    """
    height, width = x.shape[1:3]
    sides = min(side, height), min(side, width)
    places = height - sides[0] + 1, width - sides[1] + 1
    gamma = jnp.asarray(rate, jnp.float32) * (height * width)
    gamma = jnp.minimum(gamma / (sides[0] * sides[1] * places[0] * places[1]), 1)
    threshold = jnp.round(gamma * _LEVELS).astype(jnp.uint32)
    corners = random_bits(key, (x.shape[0], *places, x.shape[3])) >> 8 < threshold
    dropped = _spread(stored(_spread(stored(corners), 1, sides[0])), 2, sides[1])

    compute = jnp.promote_types(x.dtype, jnp.float32)
    kept = ~stored(dropped)
    scale = x.size / jnp.maximum(jnp.sum(kept, dtype=jnp.int32), 1).astype(compute)
    return jnp.where(kept, x.astype(compute) * scale, 0).astype(x.dtype)


def _spread(mask: Bool[Array, 'b h w c'], axis: int, side: int) -> Bool[Array, 'b h2 w2 c']:
    """Each True becomes a run of `side` from there on; the axis grows by side − 1."""
    mask = _moved(mask, axis, 0, side - 1)
    run = 1
    while run < side:  # runs of any length from few shifts: 1, 2, 4, … and what is left
        step = min(run, side - run)
        mask, run = mask | _moved(mask, axis, step, -step), run + step
    return mask


def _moved(mask: Array, axis: int, before: int, after: int) -> Array:
    widths = [(before, after, 0) if a == axis else (0, 0, 0) for a in range(mask.ndim)]
    return lax.pad(mask, False, widths)
