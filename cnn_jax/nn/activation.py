"""Activation functions by name."""

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu': nn.relu,  # max(x, 0)
    'leaky_relu': nn.leaky_relu,  # x, or 0.01·x below 0 (Maas et al. 2013)
    'elu': nn.elu,  # x, or exp(x) − 1 below 0 (Clevert et al. 2016)
    'gelu': functools.partial(nn.gelu, approximate=False),  # x·Φ(x) (Hendrycks & Gimpel 2016)
    'silu': nn.silu,  # x·sigmoid(x) (Elfwing et al. 2018)
    'tanh': nn.tanh,
}
