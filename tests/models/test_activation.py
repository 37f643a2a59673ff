"""Every activation that a config may name, at three points worked out by hand."""

from math import erf, exp, sqrt, tanh

import numpy as np
import pytest

from cnn_jax.config import Model, fields_by_path
from cnn_jax.models import ACTIVATIONS

EXPECTED = {
    'relu': lambda x: max(x, 0),
    'leaky_relu': lambda x: x if x > 0 else 0.01 * x,
    'elu': lambda x: x if x > 0 else exp(x) - 1,
    'gelu': lambda x: x * (1 + erf(x / sqrt(2))) / 2,
    'silu': lambda x: x / (1 + exp(-x)),
    'tanh': tanh,
}


def test_the_config_names_exactly_these():
    choices = fields_by_path(Model())['activation'].metadata['choices']
    assert set(choices) == set(ACTIVATIONS) == set(EXPECTED)


@pytest.mark.parametrize('name', EXPECTED)
@pytest.mark.parametrize('x', [-2.0, 0.0, 1.5])
def test_values(name, x):
    np.testing.assert_allclose(ACTIVATIONS[name](np.float32(x)), EXPECTED[name](x), atol=1e-6)
