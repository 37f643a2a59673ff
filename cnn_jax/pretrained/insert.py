"""Put pretrained weights into a model, every tensor accounted for."""

from collections.abc import Mapping

import jax.numpy as jnp

from cnn_jax.errors import UserError
from cnn_jax.params import flatten, unflatten
from cnn_jax.pretrained.layout import CONVOLUTIONS, TOP
from cnn_jax.pretrained.load import Pretrained


def insert(model_params: Mapping, pretrained: Pretrained) -> dict:
    """The model's parameters, each replaced by the pretrained one of the same name.

    Every parameter of the model must be there, and every pretrained tensor must be used, but for
    the layers that come after the model's last one: those were cut off.

    Args:
        model_params: Of a VGG16, as `init` or `eval_shape` gives them; only shapes are read.
        pretrained: What `load` returned.

    Returns:
        A new tree with the same structure as `model_params`, float32.

    Errors:
        UserError: Names or shapes differ; every one is listed.
    """
    wanted, given = flatten(model_params), flatten(pretrained.params)
    order = [*CONVOLUTIONS, *TOP]
    present = {name.split('/')[0] for name in wanted}
    last = max((order.index(layer) for layer in present if layer in order), default=-1)
    reached = set(order[: last + 1])
    problems = [f'{name} has no pretrained tensor' for name in wanted if name not in given]
    problems += [
        f'{name} is not in the model'
        for name in given
        if name not in wanted and name.split('/')[0] in reached
    ]
    problems += [
        f'{name} is {list(wanted[name].shape)} in the model and {list(given[name].shape)} in the '
        'weights'
        for name in wanted
        if name in given and wanted[name].shape != given[name].shape
    ]
    if problems or not wanted:
        raise UserError(
            f'the weights from {pretrained.source} do not fit the model: '
            f'{"; ".join(problems) or "it has no parameters"}; use VGG16 with its own layers'
        )
    return unflatten({name: jnp.array(given[name]) for name in wanted})
