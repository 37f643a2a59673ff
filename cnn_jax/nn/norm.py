"""Normalization of features: over the batch, over parts of it, and over each example's channels."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.cpu import compute_type, on_cpu, scale_and_shift, sums_with
from cnn_jax.nn.noise import is_training


class BatchNorm(nn.Module):
    """Normalize each channel by the batch's mean and variance, then scale and shift it.

    y = scale · (x − μ) / √(σ² + ε) + bias

    In training μ and σ² are the batch's mean and biased variance over every axis but the last, and
    the running averages follow, mean ← m·mean + (1−m)·μ, var alike; at inference they are these.

    Attributes:
        momentum: m, the share of the old average that is kept, 0 to 1; may be a traced scalar.
            (PyTorch's momentum is 1 − m.)
        epsilon: ε.
        use_scale: Whether there is a scale; without it, 1.
        use_bias: Whether there is a bias; without it, 0.
        dtype: Type of the result; None keeps that of x.

    Call it with `train`, or with Flax's `use_running_average`, its opposite. Collections: `params`
    holds 'scale' and 'bias', `batch_stats` 'mean' (at first 0) and 'var' (1), all float32 [c]. The
    arithmetic is float32 for bfloat16 and float16 inputs, float64 for float64 ones.

    Source: Ioffe & Szegedy 2015, "Batch Normalization"; defaults are Keras's.

    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> variables = nn.BatchNorm().init(jax.random.key(0), x, train=True)
    >>> y, updated = nn.BatchNorm().apply(variables, x, train=True, mutable='batch_stats')
    >>> y.round(2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """

    momentum: float | Float[Array, ''] = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '... c'],
        *,
        train: bool | None = None,
        use_running_average: bool | None = None,
    ) -> Float[Array, '... c']:
        axes, shape = tuple(range(x.ndim - 1)), x.shape[-1:]
        mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        scale, bias = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        if self.use_scale:
            scale = self.param('scale', nn.initializers.ones, shape, jnp.float32)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)

        if is_training(train, use_running_average, 'use_running_average'):
            running = mean.value, var.value
            y, mu, sigma2 = self.normalize(x, scale, bias, axes, running)
            if not self.is_initializing():
                for average, new in ((mean, mu), (var, sigma2)):
                    new = new.astype(average.value.dtype)
                    average.value = self.momentum * average.value + (1 - self.momentum) * new
        else:
            y = _normalize(x, mean.value, var.value, scale, bias, axes, self.epsilon)
        return y.astype(self.dtype or x.dtype)

    def normalize(self, x, scale, bias, axes, running):
        """Return y and the statistics that the averages follow; variants override it."""
        return batch_normalize(x, scale, bias, axes, self.epsilon)


class GhostBatchNorm(BatchNorm):
    """`BatchNorm` in which every n examples that follow one another are a batch of their own.

    y = scale · (x − μ_g) / √(σ_g² + ε) + bias, g the group of the example

    The running averages follow the mean over the groups of μ_g and of σ_g², once a step (those of
    Hoffer et al. one group after the other). All else is as in `BatchNorm`.

    Attributes:
        group_size: n; must divide the batch, else a `UserError`.

    Source: Hoffer et al. 2017, "Train longer, generalize better", algorithm 1.

    >>> x, layer = jnp.array([[1.0], [3.0], [10.0], [30.0]]), nn.GhostBatchNorm(group_size=2)
    >>> variables = layer.init(jax.random.key(0), x, train=True)
    >>> layer.apply(variables, x, train=True, mutable='batch_stats')[0].round(2).ravel().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """

    group_size: int = 16

    def normalize(self, x, scale, bias, axes, running):
        if len(x) % self.group_size:
            raise UserError(
                f'{"/".join(self.path) or "GhostBatchNorm"}: its groups of {self.group_size} '
                f'examples must divide the batch of {len(x)}; choose another group size '
                '(config.model.ghost_batch)'
            )
        groups, axes = x.reshape(-1, self.group_size, *x.shape[1:]), tuple(a + 1 for a in axes)
        scale, bias = (jnp.broadcast_to(v, (len(groups), *v.shape)) for v in (scale, bias))
        y, mu, sigma2 = batch_normalize(groups, scale, bias, axes, self.epsilon)
        return y.reshape(x.shape), mu.mean(axis=0), sigma2.mean(axis=0)


class BatchRenorm(BatchNorm):
    """`BatchNorm` whose output in training is corrected towards that at inference.

    y = scale · ((x − μ_B) / σ_B · r + d) + bias,  σ = √(variance + ε)
    r = clip(σ_B / σ, 1/r_max, r_max),  d = clip((μ_B − μ) / σ, −d_max, d_max)

    μ_B and σ_B are the batch's, μ and σ the running averages before this step. No gradient passes
    through r and d. Where neither is clipped, y is what inference would give.

    With w, the share of the averages that stems from data (0 at first, w ← m·w + (1 − m)), the
    limits in force are 1 + (r_max − 1)·w and d_max·w; Ioffe schedules both by step number. The
    averages are those of the variance; his algorithm 1 and Keras average the deviation.

    Attributes:
        r_max: At least 1; may be a traced scalar. With 1 and d_max = 0 this is `BatchNorm`.
        d_max: At least 0; may be a traced scalar.

    All else is as in `BatchNorm`, and `batch_stats` also holds w, a scalar, as 'share'.

    Source: Ioffe 2017, "Batch Renormalization"; defaults are its final limits.

    >>> x, layer = jnp.array([[1.0], [3.0]]), nn.BatchRenorm()
    >>> layer.init(jax.random.key(0), x, train=True)['batch_stats']['share'].item()
    0.0
    """

    r_max: float | Float[Array, ''] = 3.0
    d_max: float | Float[Array, ''] = 5.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '... c'],
        *,
        train: bool | None = None,
        use_running_average: bool | None = None,
    ) -> Float[Array, '... c']:
        self.variable('batch_stats', 'share', jnp.zeros, (), jnp.float32)
        return super().__call__(x, train=train, use_running_average=use_running_average)

    def normalize(self, x, scale, bias, axes, running):
        share = self.get_variable('batch_stats', 'share')
        if not self.is_initializing():
            moved = self.momentum * share + (1 - self.momentum)
            self.put_variable('batch_stats', 'share', moved)
        r, d = self._correction(lax.stop_gradient(x), axes, running, share)
        scale, bias = scale.astype(r.dtype), bias.astype(r.dtype)
        return batch_normalize(x, scale * r, bias + scale * d, axes, self.epsilon)

    def _correction(self, x, axes, running, share):
        rest, origin = _centred(x, axes)
        mean, var, share = (v.astype(rest.dtype) for v in (*running, share))
        # The compiler finds the same sums in batch_normalize, and computes them once.
        mu, sigma2 = moments(*sums_with(rest, rest, axes), x.size // mean.size)
        rstd = lax.rsqrt(var + self.epsilon)
        r_max, d_max = 1 + (self.r_max - 1) * share, self.d_max * share
        r = jnp.clip(jnp.sqrt(sigma2 + self.epsilon) * rstd, 1 / r_max, r_max)
        return r, jnp.clip((mu + (origin - mean)) * rstd, -d_max, d_max)


def batch_normalize(
    x: Float[Array, '...'],
    scale: Float[Array, '...'],
    bias: Float[Array, '...'],
    axes: tuple[int, ...],
    epsilon: float,
) -> tuple[Float[Array, '...'], Float[Array, '...'], Float[Array, '...']]:
    """Normalize by the batch's own statistics.

    μ = E[x], σ² = E[(x − μ)²], y = scale · (x − μ) / √(σ² + ε) + bias

    One pass over x gives the sums of x − k and of (x − k)², k being a number near the mean: σ² is
    exact to 1 + ((k − μ)/σ)² roundings, as from two passes (Chan, Golub & LeVeque 1983, "Algorithms
    for Computing the Sample Variance", section 3).

    Args:
        x: The input.
        scale, bias: Shaped like the axes of x that are not in `axes`.
        axes: Axes over which the mean is taken, ascending.
        epsilon: ε.

    Returns:
        y shaped like x, μ and σ² shaped like the scale; all of the wider of float32 and x's type.

    >>> y, mu, sigma2 = nn.batch_normalize(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1),
    ...                                    axes=(0,), epsilon=0.0)
    >>> y.ravel().tolist(), mu.item(), sigma2.item()
    ([-1.0, 1.0], 2.0, 1.0)
    """
    rest, origin = _centred(x, axes)
    scale, bias = scale.astype(rest.dtype), bias.astype(rest.dtype)
    y, mu, sigma2 = _batch_normalize(rest, scale, bias, axes, epsilon)
    return y, origin + mu, sigma2


def _centred(x, axes):
    """x − k and k, a number near the mean over the axes; what follows does not depend on which."""
    origin = _near_mean(x, axes)
    return x.astype(origin.dtype) - jnp.expand_dims(origin, axes), origin


def _near_mean(x, axes):
    """On a CPU the mean of the images' middle row. Elsewhere, where each further sum is a kernel
    and an exchange between devices, the first image's middle pixel.
    """
    x = lax.stop_gradient(x)
    if not on_cpu():
        for axis in reversed(axes):  # pixels first, so that devices exchange one
            middle = x.shape[axis] // 2 if axis else 0
            x = lax.slice_in_dim(x, middle, middle + 1, axis=axis)
        return jnp.squeeze(x, axes).astype(compute_type(x))
    if len(axes) > 1:
        rows = axes[-2]
        x = lax.slice_in_dim(x, x.shape[rows] // 2, x.shape[rows] // 2 + 1, axis=rows)
    near = x.astype(compute_type(x)).mean(axes).astype(x.dtype)  # so that x − k of equal x is 0
    # Else it is worked out again, from all that leads to it, for each number that it is taken of.
    return lax.optimization_barrier(near.astype(compute_type(x)))


def moments(
    total: Float[Array, '...'], total_of_squares: Float[Array, '...'], count: int
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Mean and biased variance from the sums of `count` numbers and of their squares.

    σ² loses the digits that μ² has more than it: take the sums relative to a number near μ.
    """
    mu = total / count
    return mu, jnp.maximum(total_of_squares / count - mu * mu, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _batch_normalize(x, scale, bias, axes, epsilon):
    mu, sigma2 = moments(*sums_with(x, x, axes), x.size // scale.size)
    return _normalize(x, mu, sigma2, scale, bias, axes, epsilon), mu, sigma2


@_batch_normalize.defjvp
def _batch_normalize_jvp(axes, epsilon, primals, tangents):
    # Left to itself, XLA on a CPU reads x once for each of the sums, and slowly. The transpose of
    # this, which training runs, takes less than half the time: two sums in one pass, and a second
    # pass for dx = a·dy + (b·x + c).
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    y, mu, sigma2 = _batch_normalize(x, scale, bias, axes, epsilon)
    count = x.size // scale.size
    rstd = lax.rsqrt(sigma2 + epsilon)
    a = scale * rstd
    total, product = sums_with(x, dx, axes)
    dmu, half_dsigma2 = total / count, (product - mu * total) / count
    slope = (dscale - a * rstd * half_dsigma2) * rstd
    shift = dbias - mu * slope - a * dmu
    dy = jnp.expand_dims(a, axes) * dx + scale_and_shift(x, slope, shift, axes)
    return (y, mu, sigma2), (dy, dmu, 2 * half_dsigma2)


def _normalize(x, mu, sigma2, scale, bias, axes, epsilon):
    compute = compute_type(x)
    mu, sigma2, scale, bias = (v.astype(compute) for v in (mu, sigma2, scale, bias))
    a = scale * lax.rsqrt(sigma2 + epsilon)
    b = bias - mu * a
    return x.astype(compute) * jnp.expand_dims(a, axes) + jnp.expand_dims(b, axes)


class GroupNorm(nn.Module):
    """Normalize each example's groups of neighbouring channels, then scale and shift channels.

    y = scale · (x − μ) / √(σ² + ε) + bias

    μ and σ² are the mean and biased variance of one example over the pixels and channels of one
    group: no example sees another, and training and inference are the same.

    Attributes:
        num_groups: Must divide the channels, else a `UserError`. 1 is layer normalization (Ba et
            al. 2016; over height, width and channels of an image, as Wu & He have it), None one
            group a channel, instance normalization (Ulyanov et al. 2016).
        epsilon: ε.

    Parameters 'scale' and 'bias' are float32 [c]. Arithmetic and accuracy as in `BatchNorm`; the
    result has the type of x.

    Source: Wu & He 2018, "Group Normalization"; ε as in Keras.

    >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
    >>> nn.GroupNorm(2).init_with_output(jax.random.key(0), x)[0].round(2).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = 1
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Float[Array, 'b ... c'], *, train: bool = False) -> Array:
        del train
        channels = x.shape[-1]
        groups = self.num_groups or channels
        if channels % groups:
            raise UserError(
                f'{"/".join(self.path) or "GroupNorm"}: {groups} groups must divide the '
                f'{channels} channels of its input; choose another number '
                '(config.model.norm_groups)'
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
    """Apply `GroupNorm` as a function.

    It sums over pixels first and over a group's channels then: on a CPU as fast as `BatchNorm`.

    >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
    >>> nn.group_normalize(x, jnp.ones(4), jnp.zeros(4), groups=2, epsilon=0.0).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    batch, channels, pixels = x.shape[0], x.shape[-1], tuple(range(1, x.ndim - 1))

    def to_channels(of_group):
        return jnp.repeat(of_group, channels // groups, axis=1)

    near = _near_mean(x.reshape(*x.shape[:-1], groups, -1), (*pixels, x.ndim))
    rest = x.astype(near.dtype) - jnp.expand_dims(to_channels(near), pixels)
    total, squares = (s.reshape(batch, groups, -1).sum(axis=-1) for s in _power_sums(rest, pixels))
    mu, sigma2 = moments(total, squares, x.size // (batch * groups))
    a = scale.astype(rest.dtype).reshape(1, -1) * to_channels(lax.rsqrt(sigma2 + epsilon))
    b = bias.astype(rest.dtype).reshape(1, -1) - to_channels(mu) * a
    return scale_and_shift(rest, a, b, pixels).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _power_sums(x, axes):
    """Σx and Σx² over the axes."""
    return sums_with(x, x, axes)


@_power_sums.defjvp
def _power_sums_jvp(axes, primals, tangents):
    (x,), (dx,) = primals, tangents
    total, product = sums_with(x, dx, axes)
    return _power_sums(x, axes), (total, 2 * product)
