"""Group, layer and instance norm against Keras, NumPy and finite differences."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.test_util import check_grads

from cnn_jax.errors import UserError
from cnn_jax.nn.norm import GroupNorm, group_normalize


def images(shape, seed=0):
    return (2 * np.random.default_rng(seed).normal(size=shape) + 3).astype(np.float32)


def apply(layer, x, scale, bias):
    return layer.apply({'params': {'scale': scale, 'bias': bias}}, x, train=True)


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
@pytest.mark.parametrize('shape', [(4, 5, 3, 6), (4, 6), (2, 7, 6)])
def test_agrees_with_keras_and_the_formula(shape, groups):
    if len(shape) == 2 and groups == shape[-1]:
        groups = 1  # one number a group says nothing
    x, c = images(shape), shape[-1]
    scale, bias = np.arange(1, c + 1, dtype=np.float32), np.arange(c, dtype=np.float32)
    y = apply(GroupNorm(groups), x, scale, bias)

    theirs = keras.layers.GroupNormalization(groups)
    theirs.build(shape)
    theirs.gamma.assign(scale)
    theirs.beta.assign(bias)
    np.testing.assert_allclose(y, theirs(x), rtol=1e-4, atol=1e-4)

    wide = np.asarray(x, np.float64).reshape(shape[0], -1, groups, c // groups)
    mean, var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    expected = ((wide - mean) / np.sqrt(var + 1e-3)).reshape(shape) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_one_group_is_keras_layer_normalization():
    for shape, axes in (((4, 5, 3, 6), (1, 2, 3)), ((4, 6), -1)):
        x = images(shape)
        theirs = keras.layers.LayerNormalization(axes, center=False, scale=False)
        ours = apply(GroupNorm(1), x, np.ones(6, np.float32), np.zeros(6, np.float32))
        np.testing.assert_allclose(ours, theirs(x), rtol=1e-4, atol=1e-4)


def test_none_is_a_group_for_each_channel():
    x, scale, bias = images((4, 5, 3, 6)), np.ones(6, np.float32), np.zeros(6, np.float32)
    instance = apply(GroupNorm(None), x, scale, bias)
    np.testing.assert_array_equal(instance, apply(GroupNorm(6), x, scale, bias))
    np.testing.assert_allclose(instance.mean((1, 2)), np.zeros((4, 6)), atol=1e-5)
    np.testing.assert_allclose(instance.var((1, 2)), np.ones((4, 6)), atol=2e-3)


def test_no_example_sees_another_and_training_is_inference():
    x = images((4, 5, 3, 6))
    layer = GroupNorm(2)
    variables = layer.init(jax.random.key(0), x, train=True)
    assert list(variables) == ['params']
    together = layer.apply(variables, x, train=True)
    np.testing.assert_array_equal(together, layer.apply(variables, x, train=False))
    np.testing.assert_allclose(layer.apply(variables, x[2:3]), together[2:3], rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_divide_the_channels_are_a_mistake():
    with pytest.raises(UserError, match='4 groups must divide the 6 channels'):
        GroupNorm(4).init(jax.random.key(0), images((2, 3, 3, 6)))


def test_bfloat16_inputs_have_float32_statistics():
    x = jnp.asarray(images((4, 32, 32, 8)), jnp.bfloat16)
    y = apply(GroupNorm(2), x, jnp.ones(8), jnp.zeros(8))
    assert y.dtype == jnp.bfloat16
    exact = apply(GroupNorm(2), x.astype(jnp.float32), jnp.ones(8), jnp.zeros(8))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(('shape', 'groups'), [((3, 2, 3, 4), 2), ((2, 3, 4), 4), ((3, 4), 2)])
def test_gradients_agree_with_finite_differences(shape, groups):
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.normal(size=s) + 1 for s in (shape, shape[-1:], shape[-1:]))

    def wavy(x, scale, bias):
        return jnp.sin(group_normalize(x, scale, bias, groups, 1e-3))

    with jax.enable_x64(True):
        assert group_normalize(x, scale, bias, groups, 1e-3).dtype == np.float64
        check_grads(wavy, (x, scale, bias), order=1, modes=['rev'])
