"""A standardized kernel has mean 0 and variance 1 a filter, and so has its gradient its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cnn_jax.nn.conv import Conv, standardize_kernel


def kernel(shape=(3, 3, 4, 5), seed=0):
    return (np.random.default_rng(seed).normal(size=shape) + 0.5).astype(np.float32)


@pytest.mark.parametrize('shape', [(3, 3, 4, 5), (7, 7, 1, 2), (1, 1, 8, 3)])
def test_each_filter_has_mean_0_and_variance_1(shape):
    w = np.asarray(standardize_kernel(kernel(shape)), np.float64)
    np.testing.assert_allclose(w.mean((0, 1, 2)), np.zeros(shape[-1]), atol=1e-6)
    np.testing.assert_allclose(w.var((0, 1, 2)), np.ones(shape[-1]), rtol=1e-3)


def test_shift_and_scale_of_a_filter_change_nothing():
    w, shift, scale = kernel(), np.arange(5, dtype=np.float32), np.arange(1, 6, dtype=np.float32)
    np.testing.assert_allclose(
        standardize_kernel(w * scale + shift), standardize_kernel(w), atol=1e-4
    )


def test_a_constant_filter_becomes_zero_with_a_finite_gradient():
    w = jnp.full((3, 3, 4, 5), 0.25)
    np.testing.assert_array_equal(standardize_kernel(w), np.zeros_like(w))
    gradient = jax.grad(lambda w: (standardize_kernel(w) * kernel()).sum())(w)
    assert np.isfinite(gradient).all()


def test_the_gradient_agrees_with_finite_differences_and_leaves_mean_and_scale():
    """It is orthogonal to the constant filter, and nearly to w itself."""
    with jax.enable_x64(True):
        w = kernel().astype(np.float64)
        check_grads(lambda w: jnp.sin(standardize_kernel(w)), (w,), order=1, modes=['rev'])
        gradient = np.asarray(jax.grad(lambda w: jnp.sin(standardize_kernel(w)).sum())(w))
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), np.zeros(5), atol=1e-9)
    centred = w - w.mean((0, 1, 2))
    np.testing.assert_allclose((gradient * centred).sum((0, 1, 2)), np.zeros(5), atol=1e-3)


def test_a_layer_convolves_with_it_and_draws_the_same_kernel():
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 4)).astype(np.float32)
    plain, layer = Conv(5), Conv(5, standardize=True)
    variables = layer.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, plain.init(jax.random.key(0), x))
    params = variables['params'] | {'kernel': standardize_kernel(variables['params']['kernel'])}
    np.testing.assert_allclose(layer.apply(variables, x), plain.apply({'params': params}, x))
