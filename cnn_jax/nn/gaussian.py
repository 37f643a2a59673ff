"""Normal noise: multiplied into features, or added to images."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from cnn_jax.nn.bits import random_bits


def normal(key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
    """Standard normal numbers by inversion, z = √2 · erf⁻¹(u), float32.

    u takes 2²³ equidistant values that lie symmetrically in (−1, 1), so |z| is below 5.3. Made of
    `random_bits`, for the reason given there; the same key gives the same numbers.
    """
    steps = (random_bits(key, shape) >> 9).astype(jnp.float32)
    return jnp.sqrt(2.0).astype(jnp.float32) * lax.erf_inv((steps + 0.5) * 2.0**-22 - 1)


def gaussian_dropout(
    key: Key[Array, ''], x: Float[Array, '... c'], rate: float | Float[Array, '']
) -> Float[Array, '... c']:
    """Multiplies each element by a normal number whose variance is that of dropout.

    y = x · (1 + √(r/(1 − r)) · z), z ~ N(0, 1); so E[y] = x and Var[y] = x² · r / (1 − r).

    Args:
        key: Random key; the same key gives the same noise.
        x: input.
        rate: r, 0 up to but not including 1; traced or not. 0 is the identity, bit for bit.

    Source: Srivastava et al. 2014, "Dropout", section 10; the variance as in Keras's
    `GaussianDropout`.
    """
    rate = jnp.asarray(rate, jnp.float32)
    factor = 1 + jnp.sqrt(rate / (1 - rate)) * normal(key, x.shape)
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor).astype(x.dtype)


def add_noise(
    key: Key[Array, ''], x: Float[Array, '...'], deviation: float | Float[Array, '']
) -> Float[Array, '...']:
    """Adds a normal number to each element.

    y = x + σ·z, z ~ N(0, 1)

    At σ = 0, y is x and nothing is drawn: which it is, the running program decides, so that one
    compilation serves every σ at no cost to runs without noise.

    Args:
        key: Random key; the same key gives the same noise.
        x: input.
        deviation: σ, at least 0, in units of x; traced or not.

    Source: Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization".
    """

    def noisy(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (wide + deviation * normal(key, x.shape)).astype(x.dtype)

    return lax.cond(jnp.asarray(deviation) > 0, noisy, lambda x: x, x)
