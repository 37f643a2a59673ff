"""Pooling against Keras and against hand-computed windows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.test_util import check_grads

from cnn_jax.errors import UserError
from cnn_jax.nn import avg_pool, global_avg_pool, max_pool, output_shape

KERAS = {max_pool: keras.layers.MaxPooling2D, avg_pool: keras.layers.AveragePooling2D}


@pytest.mark.parametrize('pool', KERAS)
@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize(('window', 'stride'), [(2, None), (3, 2), ((2, 3), (1, 2))])
def test_agrees_with_keras_and_with_the_shape_function(pool, padding, window, stride):
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    y = pool(x, window, stride, padding)
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        theirs = KERAS[pool](window, stride, padding.lower())(x)
    np.testing.assert_allclose(y, theirs, rtol=1e-5)
    assert y.shape[1:3] == output_shape((7, 8), window, stride or window, 1, padding)


@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize(('window', 'stride'), [(2, 2), (3, 2), ((2, 3), (1, 2))])
def test_the_gradient_of_the_maximum_is_xla_s_own_ties_included(padding, window, stride):
    x = np.random.default_rng(0).integers(0, 4, (2, 7, 8, 3)).astype(np.float32)
    sizes = [(n, n) if isinstance(n, int) else n for n in (window, stride)]
    ours, theirs = (
        jax.grad(lambda x, pool=pool: jnp.sum(pool(x, *sizes, padding) ** 2))(x)
        for pool in (max_pool, nn.max_pool)
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize('pool', [max_pool, avg_pool])
def test_derivatives_of_both_modes_and_orders_also_of_many(pool, padding):
    x = np.random.default_rng(0).permutation(2 * 5 * 4).reshape(2, 5, 4, 1) / 10

    @jax.jit
    def wavy(x):
        return jnp.sin(pool(x, 2, 1, padding))

    with jax.enable_x64(True):
        check_grads(wavy, (x,), order=2, modes=['fwd', 'rev'], eps=1e-4, rtol=1e-3, atol=1e-3)
        gradient = jax.jit(jax.grad(lambda x: wavy(x).sum()))
        at_once = jax.jit(jax.vmap(gradient))(x[:, None])
        np.testing.assert_allclose(at_once[:, 0], gradient(x), rtol=1e-6, atol=1e-9)


def test_windows_by_hand():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    assert max_pool(x, 2).ravel().tolist() == [4]
    assert max_pool(x, 2, padding='SAME').ravel().tolist() == [4, 5, 7, 8]
    assert avg_pool(x, 2).ravel().tolist() == [2]
    assert avg_pool(x, 2, padding='SAME').ravel().tolist() == [2, 3.5, 6.5, 8]


@pytest.mark.parametrize('pool', [max_pool, avg_pool])
def test_a_window_larger_than_the_image_is_refused(pool):
    with pytest.raises(UserError, match=rf'^{pool.__name__}: .*2×2.* input of 1×3'):
        pool(jnp.ones((1, 1, 3, 1)), 2)


def test_the_largest_value_may_be_negative():
    assert max_pool(jnp.full((1, 3, 3, 1), -5.0), 2, padding='SAME').max() == -5


def test_global_average():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    assert global_avg_pool(x).tolist() == [[3, 4]]
    many = jnp.full((1, 64, 64, 1), 1.0, jnp.bfloat16)
    assert global_avg_pool(many).dtype == jnp.bfloat16
    assert global_avg_pool(many) == 1
