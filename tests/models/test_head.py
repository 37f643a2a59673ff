"""The head and the activations: layers by name, their order, and values worked out by hand."""

import dataclasses
from math import erf, exp, sqrt, tanh

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import Model, fields_by_path
from cnn_jax.models import ACTIVATIONS, Head, activation_and_norm

CONFIG = Model(hidden=(7, 6), head_dropout=0.0)


def draw(config, x, outputs=3):
    return Head(config, outputs).init_with_output(jax.random.key(0), x, train=False)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 4, 5, 3))


def test_layers_and_shapes(x):
    logits, variables = draw(CONFIG, x)
    assert logits.shape == (2, 3)
    kernels = {k: v['kernel'].shape for k, v in variables['params'].items() if 'kernel' in v}
    assert kernels == {'dense1': (4 * 5 * 3, 7), 'dense2': (7, 6), 'logits': (6, 3)}
    assert list(variables['batch_stats']) == ['norm1', 'norm2']
    assert 'batch_stats' not in draw(dataclasses.replace(CONFIG, head_norm='none'), x)[1]


def test_average_pooling_sees_the_mean_of_each_channel(x):
    config = dataclasses.replace(CONFIG, pool='average', hidden=())
    logits, variables = draw(config, x)
    logits_layer = variables['params']['logits']
    assert logits_layer['kernel'].shape == (3, 3)
    np.testing.assert_allclose(
        logits, x.mean((1, 2)) @ logits_layer['kernel'] + logits_layer['bias'], rtol=1e-5
    )


def test_hidden_kernels_start_he_normal_and_the_last_glorot_uniform():
    x = jnp.zeros((1, 1, 1, 500))
    params = draw(dataclasses.replace(CONFIG, hidden=(400,)), x, outputs=200)[1]['params']
    np.testing.assert_allclose(params['dense1']['kernel'].std(), (2 / 500) ** 0.5, rtol=0.02)
    limit = (6 / (400 + 200)) ** 0.5
    last = params['logits']['kernel']
    assert 0.99 * limit < abs(last).max() <= limit
    np.testing.assert_allclose(last.std(), limit / 3**0.5, rtol=0.02)


@pytest.mark.parametrize(
    ('norm', 'position', 'expected'),
    [('batch', 'after', [-1, 1]), ('batch', 'before', [0, 1]), ('none', 'after', [0, 2])],
)
def test_norm_comes_before_or_after_the_activation(norm, position, expected):
    """[−2, 2] → ReLU → [0, 2] → norm → [−1, 1]; or → norm → [−1, 1] → ReLU → [0, 1]."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            config = Model(norm_position=position, norm_epsilon=0.0)
            return activation_and_norm(x, config, norm=norm, name='norm', train=True)

    x = jnp.array([[-2.0], [2.0]])
    y = Layer().init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_allclose(y.ravel(), expected, atol=1e-6)


ACTIVATED = {
    'relu': lambda x: max(x, 0),
    'leaky_relu': lambda x: x if x > 0 else 0.01 * x,
    'elu': lambda x: x if x > 0 else exp(x) - 1,
    'gelu': lambda x: x * (1 + erf(x / sqrt(2))) / 2,
    'silu': lambda x: x / (1 + exp(-x)),
    'tanh': tanh,
}


@pytest.mark.parametrize('name', fields_by_path(Model())['activation'].metadata['choices'])
def test_every_activation_that_a_config_may_name(name):
    for x in (-2.0, 0.0, 1.5):
        np.testing.assert_allclose(ACTIVATIONS[name](np.float32(x)), ACTIVATED[name](x), atol=1e-6)
