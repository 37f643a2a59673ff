"""Dropout whose rate may be a traced value."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cnn_jax.nn.bits import random_bits

_LEVELS = 2**16

Noise = Callable[[Key[Array, ''], Float[Array, '...'], float | Float[Array, '']], Array]


def dropout(
    key: Key[Array, ''],
    x: Float[Array, '... c'],
    rate: float | Float[Array, ''],
    shape: tuple[int, ...] | None = None,
) -> Float[Array, '... c']:
    """Sets each element to zero with probability r and divides the others by 1 − r.

    y = x · m / (1 − r), m ~ Bernoulli(1 − r); so E[y] = x and Var[y] = x² · r / (1 − r).

    The mask compares 16 random bits with a threshold: r is rounded to a multiple of 2⁻¹⁶, and the
    rounded r also divides, so the mean stays exact. Rates 0 (y is x, bit for bit;
    XLA may flush subnormals) and 1 (y is zero) are exact, with their gradients.

    Args:
        key: Random key; the same key gives the same mask.
        x: input.
        rate: r, 0 to 1; traced or not, the computation is the same.
        shape: Of the mask, if elements share theirs; broadcasts to the shape of x.

    Source: Srivastava et al. 2014, "Dropout"; the division is the "inverted" form in use today.
    """
    kept = jnp.round((1 - jnp.asarray(rate, jnp.float32)) * _LEVELS).astype(jnp.uint32)

    compute = jnp.promote_types(x.dtype, jnp.float32)
    scale = _LEVELS / jnp.maximum(kept, 1).astype(compute)
    is_kept = random_bits(key, shape or x.shape) >> 16 < kept
    return jnp.where(is_kept, x.astype(compute) * scale, 0).astype(x.dtype)


class Dropout(nn.Module):
    """A noise in training, the identity at inference.

    Attributes:
        rate: How much of it: for `dropout` the probability that an element is dropped, 0 to 1; a
            float or a traced scalar, so that one compiled step serves every rate.
        noise: Called as `noise(key, x, rate)`.

    Draws from the random stream 'dropout', whatever the rate, so no rate shifts another
    layer's mask.
    """

    rate: float | Float[Array, '']
    noise: Noise = dropout

    @nn.compact
    def __call__(self, x: Float[Array, '... c'], *, train: bool) -> Float[Array, '... c']:
        return self.noise(self.make_rng('dropout'), x, self.rate) if train else x
