"""Batch normalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.nn.channels import paired_sums


class BatchNorm(nn.Module):
    """Normalizes each feature by the batch's mean and variance, then scales and shifts it.

    y = scale · (x − μ) / √(σ² + ε) + bias

    In training μ and σ² are the batch's mean and biased variance over every axis that is not a
    feature axis, and the running averages follow as mean ← m·mean + (1−m)·μ, and var alike.
    At inference, or frozen, μ and σ² are those averages, which then stay as they are.

    Attributes:
        axis: Feature axis or axes: those that keep their own statistics.
        momentum: m, the share of the old average that is kept, 0 to 1; may be a traced scalar.
            (PyTorch's momentum is 1 − m.)
        epsilon: ε.
        use_scale: Whether there is a scale; without it, 1.
        use_bias: Whether there is a bias; without it, 0.
        frozen: Use the running averages and never update them, whatever `train` says.
        dtype: Type of the result; None keeps that of x.

    Collections: `params` holds 'scale' and 'bias', `batch_stats` 'mean' and 'var', all float32
    and shaped like the feature axes. The arithmetic is float32 for bfloat16 and float16 inputs,
    float64 for float64 ones. `init` leaves the averages at 0 and 1.

    Source: Ioffe & Szegedy 2015, "Batch Normalization"; defaults are Keras's.
    """

    axis: int | tuple[int, ...] = -1
    momentum: float | Float[Array, ''] = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True
    frozen: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, '...'], *, train: bool) -> Float[Array, '...']:
        features = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        features = sorted(a % x.ndim for a in features)
        axes = tuple(a for a in range(x.ndim) if a not in features)
        shape = tuple(x.shape[a] for a in features)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        scale, bias = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        if self.use_scale:
            scale = self.param('scale', nn.initializers.ones, shape, jnp.float32)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)

        if train and not self.frozen:
            running = mean.value, var.value
            y, mu, sigma2 = self.normalize(x, scale, bias, axes, running)
            if not self.is_initializing():
                for average, new in ((mean, mu), (var, sigma2)):
                    moved = self.momentum * average.value + (1 - self.momentum) * new
                    average.value = moved.astype(average.value.dtype)
        else:
            y = _normalize(x, mean.value, var.value, scale, bias, axes, self.epsilon)
        return y.astype(self.dtype or x.dtype)

    def normalize(self, x, scale, bias, axes, running):
        """y and the statistics that the averages follow, in training; what variants change."""
        del running
        return batch_normalize(x, scale, bias, axes, self.epsilon)


def batch_normalize(
    x: Float[Array, '...'],
    scale: Float[Array, '...'],
    bias: Float[Array, '...'],
    axes: tuple[int, ...],
    epsilon: float,
) -> tuple[Float[Array, '...'], Float[Array, '...'], Float[Array, '...']]:
    """Normalization by the batch's own statistics.

    μ = E[x], σ² = max(E[x²] − μ², 0), y = scale · (x − μ) / √(σ² + ε) + bias

    Reverse-mode differentiable in x, scale and bias. One pass over x costs accuracy where the
    mean is large: σ² is exact to about μ² times the precision of the computation's type.

    Args:
        x: input.
        scale, bias: Shaped like the axes of x that are not in `axes`.
        axes: Axes over which the mean is taken, ascending.
        epsilon: ε.

    Returns:
        y shaped like x, μ and σ² shaped like the scale; all of the wider of float32 and x's type.
    """
    return _batch_normalize(x, scale, bias, axes, epsilon)


def moments(
    total: Float[Array, '...'], total_of_squares: Float[Array, '...'], count: int
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Mean and biased variance from the sums of `count` numbers and of their squares."""
    mu = total / count
    return mu, jnp.maximum(total_of_squares / count - mu * mu, 0)


def _forward(x, scale, bias, axes, epsilon):
    count = x.size // scale.size
    wide = x.astype(compute_type(x))
    mu, sigma2 = moments(*paired_sums(wide, wide * wide, axes), count)
    y = _normalize(x, mu, sigma2, scale, bias, axes, epsilon)
    return (y, mu, sigma2), (x, scale, bias, mu, sigma2)


def _backward(axes, epsilon, residuals, cotangents):
    x, scale, bias, mu, sigma2 = residuals
    dy, dmu, dsigma2 = cotangents
    count = x.size // scale.size
    x_dtype, x = x.dtype, x.astype(compute_type(x))
    rstd = lax.rsqrt(sigma2 + epsilon)
    dbias, dy_x = paired_sums(dy, dy * x, axes)
    dscale = (dy_x - mu * dbias) * rstd
    # dx = a·dy + b·x + c: the paths through y, through μ and through σ², by powers of x.
    a = scale * rstd
    b = (2 * dsigma2 - a * rstd * dscale) / count
    c = (dmu - a * dbias) / count - b * mu
    a, b, c = (jnp.expand_dims(v, axes) for v in (a, b, c))
    dx = a * dy + (b * x + c)
    return dx.astype(x_dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


# Left to itself, XLA on a CPU reads x once for each of the sums, and slowly; written by hand,
# with the sums in pairs, a layer and its gradient take less than half the time.
_batch_normalize = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(3, 4))
_batch_normalize.defvjp(_forward, _backward)


def _normalize(x, mu, sigma2, scale, bias, axes, epsilon):
    a = scale * lax.rsqrt(sigma2 + epsilon)
    b = bias - mu * a
    return x.astype(compute_type(x)) * jnp.expand_dims(a, axes) + jnp.expand_dims(b, axes)


def compute_type(x: Array) -> jnp.dtype:
    """The type in which statistics of x are computed: float32, or x's if that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)
