"""Dropout layers by name."""

import functools

from cnn_jax.config import Model
from cnn_jax.nn.drop import Dropout, dropout
from cnn_jax.nn.drop_block import drop_block
from cnn_jax.nn.drop_channel import channel_dropout
from cnn_jax.nn.gaussian import gaussian_dropout


def dropping(config: Model, name: str) -> Dropout:
    """The layer of the kind and the rate that a config asks for, called as `layer(x, train=...)`.

    Args:
        config: Reads drop_kind, drop_block and dropout, which may be traced.
        name: Of the layer.
    """
    kinds = {
        'element': dropout,
        'channel': channel_dropout,
        'block': functools.partial(drop_block, side=config.drop_block),
        'gaussian': gaussian_dropout,
    }
    return Dropout(config.dropout, kinds[config.drop_kind], name=name)
