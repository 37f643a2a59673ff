"""Batch statistics estimated again, for the weights that are evaluated.

The moving averages of batch normalization lag behind the weights, were taken under dropout, and
belong to the raw weights where averaged ones are evaluated. Here they are taken anew, for a few
batches' forward passes before each evaluation and checkpoint; training never sees them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.train.state import State, Values

# The network in training, without noise and corrections, so that each layer sees what it will see
# in inference; its new moving averages are the batch's own statistics.
QUIET = {
    'model.norm_momentum': 0.0,
    'model.renorm_r': 1.0,
    'model.renorm_d': 0.0,
    'model.dropout': 0.0,
    'model.head_dropout': 0.0,
    'model.stochastic_depth': 0.0,
    'model.input_noise': 0.0,
}


def quiet(config: cfg.Config) -> dict[str, Any]:
    """The changes to a config under which `pooled` may be given the network's statistics.

    Groups of a batch become the batch: their variances lack that between the groups.
    """
    ghosts = [name for name in ('norm', 'head_norm') if getattr(config.model, name) == 'ghost']
    return QUIET | {f'model.{name}': 'batch' for name in ghosts}


def pooled(average: dict[str, Any], batch: dict[str, Any], number: Int[Array, '']):
    """The statistics of n batches together, from those of n − 1 and of the n-th.

    mean ← mean + δ/n,  var ← var + (σ² − var)/n + δ²·(n − 1)/n²,  δ = μ − mean

    so that after N equal batches they are the mean and the biased variance of all their values.

    Args:
        average: Batch statistics of the batches before; of any values for n = 1.
        batch: μ and σ² of this batch, as leaves `mean` and `var` of the same tree. Other leaves
            are averaged.
        number: n, from 1.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; the update is that of
        Chan, Golub & LeVeque 1983.
    """
    old, new = params.flatten(average), params.flatten(batch)
    n = jnp.asarray(number, jnp.float32)
    moved = {path: leaf + (new[path] - leaf) / n for path, leaf in old.items()}
    for path in moved:
        module, _, name = path.rpartition('/')
        mean = f'{module}/mean'
        if name == 'var' and mean in old:
            moved[path] += jnp.square(new[mean] - old[mean]) * (n - 1) / (n * n)
    # Frozen statistics are the same in each batch, and keep their bits.
    return params.unflatten(
        {path: jnp.where(number == 1, new[path], leaf) for path, leaf in moved.items()}
    )


def renewed(estimate: Callable, state: State, batches: Iterable, values: Values) -> State:
    """The state with `precise` taken from some batches.

    Args:
        estimate: `Steps.estimate`, jitted.
        state: Whose evaluated weights the statistics are of.
        batches: The first `train.precise_norm` of training, in their order; not augmented here.
        values: As the steps take them.
    """
    for number, batch in enumerate(batches, start=1):
        statistics = estimate(state, batch, np.int32(number), values)
        state = dataclasses.replace(state, precise=statistics)
    return state
