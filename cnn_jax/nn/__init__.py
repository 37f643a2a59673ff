"""Layers: Flax Linen modules for your own nets, and the pure functions under them.

    import jax
    import jax.numpy as jnp
    from cnn_jax import nn

    layer = nn.Conv(32, kernel_size=3, strides=2)

Images are NHWC. A layer that behaves otherwise in training is called with the keyword `train` (or
Flax's own `deterministic` and `use_running_average`). All of them differentiate in every mode and
order, and under `vmap`, on every backend. The examples below assume these imports.
"""

from cnn_jax.nn.conv import Conv, avg_pool, conv2d, global_avg_pool, max_pool, standardize_kernel
from cnn_jax.nn.noise import (
    Dropout,
    add_noise,
    channel_dropout,
    depth_rate,
    drop_block,
    dropout,
    gaussian_dropout,
    random_bits,
    stochastic_depth,
)
from cnn_jax.nn.norm import (
    BatchNorm,
    BatchRenorm,
    GhostBatchNorm,
    GroupNorm,
    batch_normalize,
    group_normalize,
)
from cnn_jax.nn.padding import output_shape, resolve_padding

__all__ = [
    'BatchNorm',
    'BatchRenorm',
    'Conv',
    'Dropout',
    'GhostBatchNorm',
    'GroupNorm',
    'add_noise',
    'avg_pool',
    'batch_normalize',
    'channel_dropout',
    'conv2d',
    'depth_rate',
    'drop_block',
    'dropout',
    'gaussian_dropout',
    'global_avg_pool',
    'group_normalize',
    'max_pool',
    'output_shape',
    'random_bits',
    'resolve_padding',
    'standardize_kernel',
    'stochastic_depth',
]
