"""What follows the convolutions: hidden Dense layers and the output."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.config import Model
from cnn_jax.models.normalization import normalization
from cnn_jax.nn.activation import ACTIVATIONS
from cnn_jax.nn.drop import Dropout
from cnn_jax.nn.pool import global_average


class Head(nn.Module):
    """Flatten or global average, then Dense → activation and norm → dropout for each hidden
    width, then the output Dense.

    Attributes:
        config: Reads pool, hidden, head_norm, head_dropout, dtype and what `activate` does.
            Dropout rate and momentum may be traced.
        num_outputs: K.

    Layers: `dense1`, `norm1`, `drop1`, `dense2`, …, `logits`. Hidden kernels start He-normal,
    the output's Glorot-uniform. Returns float32 logits [b, K], computed in float32.
    """

    config: Model
    num_outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        c = self.config
        x = global_average(x) if c.pool == 'average' else x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.hidden, start=1):
            he_normal = nn.initializers.he_normal()
            x = nn.Dense(width, dtype=c.dtype, kernel_init=he_normal, name=f'dense{i}')(x)
            x = activate(x, c, norm=c.head_norm, name=f'norm{i}', train=train)
            x = Dropout(c.head_dropout, name=f'drop{i}')(x, train=train)
        glorot_uniform = nn.initializers.glorot_uniform()
        logits = nn.Dense(
            self.num_outputs, dtype=jnp.float32, kernel_init=glorot_uniform, name='logits'
        )
        return logits(x)


def activate(
    x: Float[Array, '... c'], config: Model, *, norm: str, name: str, train: bool
) -> Float[Array, '... c']:
    """Activation and normalization in the configured order, inside a compact module.

    Args:
        x: What a convolution or Dense layer returned.
        config: Reads activation, norm_position and what `normalization` does.
        norm: `none`, or a kind that `normalization` knows.
        name: Of the normalization layer.
        train: Whether the batch's own statistics are used.
    """
    activation = ACTIVATIONS[config.activation]
    if norm == 'none':
        return activation(x)
    normalize = functools.partial(normalization(config, norm, name), train=train)
    if config.norm_position == 'before':
        return activation(normalize(x))
    return normalize(activation(x))
