"""Batch renormalization."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.nn.channels import paired_sums
from cnn_jax.nn.norm import BatchNorm, batch_normalize, compute_type, moments


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
        total, squares = paired_sums(wide, wide * wide, axes)
        mu, sigma2 = moments(total, squares, x.size // mean.size)
        rstd = lax.rsqrt(var + self.epsilon)
        r_max, d_max = 1 + (self.r_max - 1) * share, self.d_max * share
        r = jnp.clip(jnp.sqrt(sigma2 + self.epsilon) * rstd, 1 / r_max, r_max)
        return r, jnp.clip((mu - mean) * rstd, -d_max, d_max)
