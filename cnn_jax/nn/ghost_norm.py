"""Batch normalization over parts of the batch."""

import jax.numpy as jnp

from cnn_jax.errors import UserError
from cnn_jax.nn.norm import BatchNorm, batch_normalize


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
