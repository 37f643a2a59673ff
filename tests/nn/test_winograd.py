"""Frozen layers: kernels are transformed once, bias and ReLU applied as results are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_jax import params
from cnn_jax.backbones import VGG16
from cnn_jax.nn import native
from cnn_jax.nn.conv import Conv
from cnn_jax.nn.winograd import transform_kernels, winograd_interceptor


def draw(layer, *shape):
    x = jnp.array(np.random.default_rng(0).standard_normal(shape, np.float32))
    variables = layer.init(jax.random.key(0), x)['params']
    flat = params.flatten(variables)
    noisy = {path: leaf + 0.1 if leaf.ndim == 1 else leaf for path, leaf in flat.items()}
    return x, noisy


def apply(layer, flat, x, interceptor=None):
    def run(flat, x):
        variables = {'params': params.unflatten(flat)}
        if interceptor is None:
            return layer.apply(variables, x)
        with nn.intercept_methods(interceptor):
            return layer.apply(variables, x)

    return np.asarray(jax.jit(run)(flat, x))


LAYERS = (
    Conv(16, 7, 2, 'VALID', activation=nn.relu),
    Conv(8, (3, 2), (1, 2), ((2, 0), (1, 1))),
    Conv(8, 3, kernel_dilation=2, activation=nn.tanh),
    # As they are: of other types, groups, padding, or without a bias.
    Conv(8, 3, dtype=jnp.bfloat16),
    Conv(6, 3, feature_group_count=3),
    Conv(8, 3, padding='REFLECT', activation=nn.relu),
    Conv(8, 3, use_bias=False),
)


@pytest.mark.parametrize('layer', LAYERS, ids=str)
def test_a_frozen_layer_has_the_bits_of_a_trained_one(layer):
    x, flat = draw(layer, 2, 11, 9, 3)
    assert all(transform_kernels(flat)[path] is leaf for path, leaf in flat.items())
    expected = apply(layer, flat, x)
    np.testing.assert_array_equal(apply(layer, flat, x, winograd_interceptor), expected)


@pytest.mark.parametrize('size', [(33, 47), (64, 64)])
def test_transformed_kernels_give_a_network_up_to_1e_5_of_the_norm(size):
    model = VGG16(cut='block3_pool')
    x, flat = draw(model, 2, *size, 3)
    fast = transform_kernels(flat)
    changed = {path.split('/')[0] for path in flat if fast[path] is not flat[path]}
    assert changed == {path.split('/')[0] for path in flat} - {'block1_conv1'}
    difference = apply(model, fast, x, winograd_interceptor) - apply(model, flat, x)
    assert 0 < np.linalg.norm(difference) < 1e-5 * np.linalg.norm(apply(model, flat, x))


def test_without_the_library_nothing_changes(monkeypatch):
    monkeypatch.setattr(native, 'available', lambda: False)
    layer = Conv(16, activation=nn.relu)
    x, flat = draw(layer, 1, 8, 8, 16)
    assert transform_kernels(flat) is flat
    np.testing.assert_array_equal(
        apply(layer, flat, x, winograd_interceptor), apply(layer, flat, x)
    )
