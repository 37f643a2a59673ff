"""Standardization of a convolution's kernel."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

EPSILON = 1e-5


def standardized(kernel: Float[Array, 'kh kw c f']) -> Float[Array, 'kh kw c f']:
    """The kernel with mean 0 and variance 1 over the numbers of each filter.

    ŵ[…,f] = (w[…,f] − μ_f) / √(σ_f² + ε), μ_f and σ_f² the mean and biased variance of filter f

    The gradient passes through μ and σ: what it would do to them, it does not do to w. Scale and
    mean of w lose their meaning, those of the output are left to the norm that follows.

    Args:
        kernel: HWIO. ε is 1e-5, so that a constant filter becomes 0.

    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization".
    """
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(centred**2, axis=(0, 1, 2), keepdims=True)
    return centred * lax.rsqrt(variance + EPSILON)
