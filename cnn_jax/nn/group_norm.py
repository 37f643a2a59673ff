"""Group normalization, and its ends: layer and instance normalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.channels import paired_sums
from cnn_jax.nn.norm import compute_type, moments


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
    return paired_sums(x, x * x, _pixels(x)) if x.ndim > 2 else (x, x * x)


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
    db, da = paired_sums(dy, dy * x, pixels) if pixels else (dy, dy * x)
    return dy * jnp.expand_dims(a, pixels), da, db


def _pixels(x):
    return tuple(range(1, x.ndim - 1))


# By hand for the reason given in `nn.norm`: sums in pairs.
_pixel_sums.defvjp(lambda x: (_pixel_sums(x), x), _pixel_sums_backward)
_affine.defvjp(lambda x, a, b: (_affine(x, a, b), (x, a)), _affine_backward)
