"""The peer: VGG16's frozen convolutions from Flax's modules, which are XLA's convolutions."""

import importlib.metadata

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from benchmarks.problem import VGG16, Problem, backbone_weights, prepared
from benchmarks.worker import Contender, forward


class Backbone(nn.Module):
    """The thirteen convolutions and five poolings."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        for i, (width, count) in enumerate(VGG16, start=1):
            for j in range(1, count + 1):
                x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f'block{i}_conv{j}')(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return x


def start(problem: Problem) -> Contender:
    """Prepared images in, features out."""
    weights = jax.device_put(unflatten_dict(backbone_weights(problem), sep='/'))
    compute = jax.jit(Backbone(problem.config['model']['dtype']).apply)
    version = f'flax {importlib.metadata.version("flax")}'
    return forward(
        lambda x: np.asarray(compute({'params': weights}, x)), list(prepared(problem)), version
    )
