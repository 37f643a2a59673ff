"""BatchNorm against Keras, against its formula in NumPy, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from cnn_jax.nn.norm import BatchNorm, batch_normalize


def batches(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    return [(2 * rng.normal(size=shape) + 3).astype(np.float32) for _ in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def train_step(layer, variables, x):
    y, updated = layer.apply(variables, x, train=True, mutable=['batch_stats'])
    return y, {**variables, **updated}


@pytest.mark.parametrize(('axis', 'shape'), [(-1, (8, 5, 6, 4)), (1, (8, 4, 5, 6)), (-1, (16, 4))])
def test_agrees_with_keras_in_training_and_inference(axis, shape):
    theirs = keras.layers.BatchNormalization(axis=axis, momentum=0.9)
    ours = BatchNorm(axis=axis, momentum=0.9)
    first, *rest = batches(6, shape)
    variables = ours.init(jax.random.key(0), first, train=True)
    theirs.build(shape)
    scale, bias = np.arange(1, 5, dtype=np.float32), np.arange(4, dtype=np.float32)
    theirs.gamma.assign(scale)
    theirs.beta.assign(bias)
    variables = {**variables, 'params': {'scale': scale, 'bias': bias}}

    for x in rest:
        y, variables = train_step(ours, variables, x)
        np.testing.assert_allclose(y, theirs(x, training=True), rtol=1e-4, atol=1e-5)
    averages = variables['batch_stats']
    np.testing.assert_allclose(averages['mean'], theirs.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(averages['var'], theirs.moving_variance, rtol=1e-5)
    y = ours.apply(variables, first, train=False)
    np.testing.assert_allclose(y, theirs(first, training=False), rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_keras():
    theirs = keras.layers.BatchNormalization()
    assert (BatchNorm().momentum, BatchNorm().epsilon) == (theirs.momentum, theirs.epsilon)


@settings(max_examples=6, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5).filter(lambda s: np.prod(s) > 4),
    data=st.data(),
)
def test_any_feature_axes_follow_the_formula(shape, data):
    subsets = st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape) - 1)
    axis = tuple(data.draw(subsets))
    x = batches(1, shape)[0]
    y, variables = BatchNorm(axis=axis).init_with_output(jax.random.key(0), x, train=True)
    others = tuple(a for a in range(x.ndim) if a not in axis)
    mean, var = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), rtol=1e-3, atol=2e-3)
    assert variables['batch_stats']['mean'].shape == tuple(x.shape[a] for a in sorted(axis))


def test_momentum_is_the_share_of_the_old_average():
    x = jnp.full((4, 2), 10.0)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables['batch_stats']['mean'], [0, 0])
    np.testing.assert_array_equal(variables['batch_stats']['var'], [1, 1])
    _, variables = train_step(BatchNorm(momentum=0.75), variables, x)
    np.testing.assert_allclose(variables['batch_stats']['mean'], [2.5, 2.5])
    np.testing.assert_allclose(variables['batch_stats']['var'], [0.75, 0.75])


def test_one_compilation_serves_every_momentum():
    traces = []

    @jax.jit
    def step(variables, x, momentum):
        traces.append(momentum)
        layer = BatchNorm(momentum=momentum)
        return layer.apply(variables, x, train=True, mutable='batch_stats')[1]['batch_stats']

    x = batches(1, (8, 3))[0]
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    for momentum in (0.0, 0.5, 1.0):
        mean = step(variables, x, momentum)['mean']
        np.testing.assert_allclose(mean, (1 - momentum) * x.mean(0), rtol=1e-6)
    assert len(traces) == 1


def test_frozen_uses_the_averages_and_leaves_them():
    x = batches(1, (8, 3))[0]
    layer = BatchNorm(frozen=True)
    variables = layer.init(jax.random.key(0), x, train=True)
    y, after = train_step(layer, variables, x)
    np.testing.assert_array_equal(y, BatchNorm().apply(variables, x, train=False))
    jax.tree.map(np.testing.assert_array_equal, after, variables)


def test_without_scale_and_bias_there_are_no_parameters():
    x = batches(1, (8, 3))[0]
    variables = BatchNorm(use_scale=False, use_bias=False).init(jax.random.key(0), x, train=True)
    assert 'params' not in variables
    only_bias = BatchNorm(use_scale=False).init(jax.random.key(0), x, train=True)
    assert list(only_bias['params']) == ['bias']


def test_bfloat16_inputs_have_float32_statistics():
    x = jnp.asarray(batches(1, (64, 8, 8, 3))[0], jnp.bfloat16)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    y, after = train_step(BatchNorm(momentum=0.0), variables, x)
    assert y.dtype == jnp.bfloat16
    assert after['batch_stats']['mean'].dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(after['batch_stats']['mean'], exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(after['batch_stats']['var'], exact.var((0, 1, 2)), rtol=1e-5)
    gradient = jax.grad(lambda x: train_step(BatchNorm(), variables, x)[0][0, 0, 0, 0])(x)
    assert gradient.dtype == jnp.bfloat16
    assert BatchNorm(dtype='float32').apply(variables, x, train=False).dtype == jnp.float32


@pytest.mark.parametrize(
    ('shape', 'axes'), [((6, 3), (0,)), ((2, 4, 3, 5), (0, 1, 2)), ((3, 2, 4), (0, 2))]
)
def test_gradients_agree_with_finite_differences(shape, axes):
    """Through the output and through both statistics, in float64."""
    rng = np.random.default_rng(0)
    features = [n for axis, n in enumerate(shape) if axis not in axes]
    x, scale, bias = (
        rng.normal(size=shape) + 1,
        rng.normal(size=features),
        rng.normal(size=features),
    )

    def wavy(x, scale, bias):
        return [jnp.sin(v) for v in batch_normalize(x, scale, bias, axes, 1e-3)]

    with jax.enable_x64(True):
        assert batch_normalize(x, scale, bias, axes, 1e-3)[0].dtype == np.float64
        check_grads(wavy, (x, scale, bias), order=1, modes=['rev'])


def test_a_constant_input_is_finite_with_its_gradient():
    x = jnp.full((8, 2), 1e3)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    y, gradient = jax.value_and_grad(lambda x: train_step(BatchNorm(), variables, x)[0].sum())(x)
    assert np.isfinite(y)
    assert np.isfinite(gradient).all()


def test_is_the_same_for_each_model_of_a_vmap():
    x = jnp.stack(batches(3, (8, 4, 4, 2)))
    scale, bias = jnp.ones(2), jnp.zeros(2)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: (batch_normalize(x, scale, bias, (0, 1, 2), 1e-3)[0] ** 3).sum())(
            x
        )

    for together, alone in zip(jax.vmap(gradient)(x), map(gradient, x)):
        np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
