"""Normalization of features: over the batch, over parts of it, and over each example's channels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.cpu import sum_pair


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
    mu, sigma2 = moments(*sum_pair(wide, wide * wide, axes), count)
    y = _normalize(x, mu, sigma2, scale, bias, axes, epsilon)
    return (y, mu, sigma2), (x, scale, bias, mu, sigma2)


def _backward(axes, epsilon, residuals, cotangents):
    x, scale, bias, mu, sigma2 = residuals
    dy, dmu, dsigma2 = cotangents
    count = x.size // scale.size
    x_dtype, x = x.dtype, x.astype(compute_type(x))
    rstd = lax.rsqrt(sigma2 + epsilon)
    dbias, dy_x = sum_pair(dy, dy * x, axes)
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


class GhostBatchNorm(BatchNorm):
    """`BatchNorm` in which every n examples that follow one another are a batch of their own.

    y = scale · (x − μ_g) / √(σ_g² + ε) + bias, g the group of the example

    The running averages follow the mean over the groups of μ_g and of σ_g², once a step. (Hoffer
    et al. let them follow one group after the other.) Inference is that of `BatchNorm`, and so are
    attributes and collections. The statistics depend on the order of the examples alone, not on
    how many devices share the batch.

    Attributes:
        group_size: n; divides the batch, else the call is a `UserError`.

    Source: Hoffer et al. 2017, "Train longer, generalize better", algorithm 1.
    """

    group_size: int = 16

    def normalize(self, x, scale, bias, axes, running):
        del running
        if len(x) % self.group_size:
            raise UserError(
                f'{"/".join(self.path) or "GhostBatchNorm"}: its groups of {self.group_size} '
                f'examples must divide the batch of {len(x)}; change config.model.ghost_batch'
            )
        groups = x.reshape(-1, self.group_size, *x.shape[1:])
        scale, bias = (jnp.broadcast_to(v, (len(groups), *v.shape)) for v in (scale, bias))
        y, mu, sigma2 = batch_normalize(
            groups, scale, bias, tuple(a + 1 for a in axes), self.epsilon
        )
        return y.reshape(x.shape), mu.mean(axis=0), sigma2.mean(axis=0)


class BatchRenorm(BatchNorm):
    """`BatchNorm` whose output in training is corrected towards that at inference.

    y = scale · ((x − μ_B) / σ_B · r + d) + bias,  σ = √(variance + ε)
    r = clip(σ_B / σ, 1/r_max, r_max),  d = clip((μ_B − μ) / σ, −d_max, d_max)

    μ_B and σ_B are the batch's, μ and σ the running averages before this step. No gradient passes
    through r and d. Where neither is clipped, y is what inference would give.

    Averages that have seen little must not correct much: with w, the share of the averages that
    stems from data (0 at first, w ← m·w + (1 − m)), the limits in force are 1 + (r_max − 1)·w and
    d_max·w. So training starts as batch normalization and opens at the averages' own pace; Ioffe
    schedules both limits by step number instead.

    Attributes:
        r_max: At least 1; may be a traced scalar. With 1 and d_max = 0 this is `BatchNorm`.
        d_max: At least 0; may be a traced scalar.

    The others and the collections are those of `BatchNorm`; `batch_stats` also holds w, a scalar.

    Source: Ioffe 2017, "Batch Renormalization"; defaults are its final limits.
    """

    r_max: float | Float[Array, ''] = 3.0
    d_max: float | Float[Array, ''] = 5.0

    @nn.compact
    def __call__(self, x: Float[Array, '...'], *, train: bool) -> Float[Array, '...']:
        self.variable('batch_stats', 'share', jnp.zeros, (), jnp.float32)
        return super().__call__(x, train=train)

    def normalize(self, x, scale, bias, axes, running):
        share = self.get_variable('batch_stats', 'share')
        if not self.is_initializing():
            moved = self.momentum * share + (1 - self.momentum)
            self.put_variable('batch_stats', 'share', moved)
        r, d = self._correction(lax.stop_gradient(x), axes, running, share)
        return batch_normalize(x, scale * r, bias + scale * d, axes, self.epsilon)

    def _correction(self, x, axes, running, share):
        mean, var = running
        wide = x.astype(compute_type(x))
        # The compiler finds the same sums in batch_normalize, and computes them once.
        total, squares = sum_pair(wide, wide * wide, axes)
        mu, sigma2 = moments(total, squares, x.size // mean.size)
        rstd = lax.rsqrt(var + self.epsilon)
        r_max, d_max = 1 + (self.r_max - 1) * share, self.d_max * share
        r = jnp.clip(jnp.sqrt(sigma2 + self.epsilon) * rstd, 1 / r_max, r_max)
        return r, jnp.clip((mu - mean) * rstd, -d_max, d_max)


class GroupNorm(nn.Module):
    """Normalizes each example's groups of neighbouring channels, then scales and shifts channels.

    y = scale · (x − μ) / √(σ² + ε) + bias

    μ and σ² are the mean and biased variance of one example over the pixels and channels of one
    group: no example sees another, and training and inference are the same.

    Attributes:
        groups: 1 is layer normalization (Ba et al. 2016; over height, width and channels of an
            image, as Wu & He have it), None one group a channel, instance normalization (Ulyanov
            et al. 2016). Must divide the channels, else the call is a `UserError`.
        epsilon: ε.

    Parameters 'scale' and 'bias' are float32 [c]. The arithmetic is float32 for bfloat16 and
    float16 inputs; the result has the type of x. Accuracy as in `batch_normalize`.

    Source: Wu & He 2018, "Group Normalization"; ε as in Keras.
    """

    groups: int | None = 1
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Float[Array, 'b ... c'], *, train: bool = False) -> Array:
        del train
        channels = x.shape[-1]
        groups = self.groups or channels
        if channels % groups:
            raise UserError(
                f'{"/".join(self.path) or "GroupNorm"}: {groups} groups must divide the '
                f'{channels} channels of its input; change config.model.norm_groups'
            )
        scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)
        return group_normalize(x, scale, bias, groups, self.epsilon)


def group_normalize(
    x: Float[Array, 'b ... c'],
    scale: Float[Array, ' c'],
    bias: Float[Array, ' c'],
    groups: int,
    epsilon: float,
) -> Float[Array, 'b ... c']:
    """`GroupNorm` as a function; reverse-mode differentiable in x, scale and bias.

    It sums over the pixels of each channel first and over the channels of a group then, so that
    on a CPU it costs about as much as batch normalization.
    """
    batch, channels = x.shape[0], x.shape[-1]
    wide = x.astype(compute_type(x))
    total, squares = (s.reshape(batch, groups, -1).sum(axis=-1) for s in _pixel_sums(wide))
    mu, sigma2 = moments(total, squares, x.size // (batch * groups))
    mu, rstd = (
        jnp.repeat(v, channels // groups, axis=1) for v in (mu, lax.rsqrt(sigma2 + epsilon))
    )
    a = scale.reshape(1, -1) * rstd
    return _affine(wide, a, bias.reshape(1, -1) - mu * a).astype(x.dtype)


@jax.custom_vjp
def _pixel_sums(x):
    """Σx and Σx² over all axes but the first and the last."""
    return sum_pair(x, x * x, _pixels(x)) if x.ndim > 2 else (x, x * x)


def _pixel_sums_backward(x, cotangents):
    dtotal, dsquares = (jnp.expand_dims(d, _pixels(x)) for d in cotangents)
    return (dtotal + 2 * x * dsquares,)


@jax.custom_vjp
def _affine(x, a, b):
    """x·a + b, with a and b [b, c]."""
    return x * jnp.expand_dims(a, _pixels(x)) + jnp.expand_dims(b, _pixels(x))


def _affine_backward(residuals, dy):
    x, a = residuals
    pixels = _pixels(x)
    db, da = sum_pair(dy, dy * x, pixels) if pixels else (dy, dy * x)
    return dy * jnp.expand_dims(a, pixels), da, db


def _pixels(x):
    return tuple(range(1, x.ndim - 1))


# By hand for the reason given in `nn.norm`: sums in pairs.
_pixel_sums.defvjp(lambda x: (_pixel_sums(x), x), _pixel_sums_backward)
_affine.defvjp(lambda x, a, b: (_affine(x, a, b), (x, a)), _affine_backward)
