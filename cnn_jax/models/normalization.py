"""Normalization layers by name."""

import flax.linen as nn

from cnn_jax.config import Model
from cnn_jax.nn.ghost_norm import GhostBatchNorm
from cnn_jax.nn.group_norm import GroupNorm
from cnn_jax.nn.norm import BatchNorm
from cnn_jax.nn.renorm import BatchRenorm


def normalization(config: Model, kind: str, name: str) -> nn.Module:
    """The layer of a kind, called as `layer(x, train=...)`.

    Args:
        config: Reads norm_momentum, norm_epsilon, norm_groups, ghost_batch, renorm_r and renorm_d.
        kind: Batch | ghost | renorm | group | layer | instance.
        name: Of the layer.
    """
    epsilon = config.norm_epsilon
    groups = {'group': config.norm_groups, 'layer': 1, 'instance': None}
    if kind in groups:
        return GroupNorm(groups[kind], epsilon, name=name)
    batch = {'momentum': config.norm_momentum, 'epsilon': epsilon, 'name': name}
    if kind == 'ghost':
        return GhostBatchNorm(group_size=config.ghost_batch, **batch)
    if kind == 'renorm':
        return BatchRenorm(r_max=config.renorm_r, d_max=config.renorm_d, **batch)
    return BatchNorm(**batch)
