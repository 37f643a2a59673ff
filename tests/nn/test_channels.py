import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.nn.channels import add_bias, channel_sums


@pytest.mark.parametrize('shape', [(5, 3), (4, 6, 3), (2, 5, 7, 3), (1, 1, 1, 1)])
def test_sums_agree_with_float64(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = x.astype(np.float64).sum(axis=tuple(range(x.ndim - 1)))
    np.testing.assert_allclose(channel_sums(jnp.array(x)), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_bias_is_the_sum_of_what_it_was_added_to():
    x, dy = (jnp.array(np.random.default_rng(i).normal(size=(2, 3, 4, 5))) for i in (0, 1))
    y, pull_back = jax.vjp(add_bias, x, jnp.arange(5.0))
    dx, dbias = pull_back(dy)
    np.testing.assert_array_equal(y, x + jnp.arange(5.0))
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_allclose(dbias, dy.sum((0, 1, 2)), rtol=1e-6)
