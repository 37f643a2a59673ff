"""Laws of stochastic depth: whole branches, its moments, its ends, its rates by depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.nn.noise import depth_rate, stochastic_depth

KEY = jax.random.key(0)
ONES = np.ones((2**14, 2, 1, 3), np.float32)
apply = jax.jit(stochastic_depth)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_a_branch_of_an_example_is_skipped_as_a_whole_and_its_mean_stays(rate):
    """Var[y] = x²·r/(1−r), so five standard errors of 2¹⁴ examples bound the mean."""
    y = np.asarray(apply(KEY, ONES, rate), np.float64)
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1, :1], y.shape))
    assert len(np.unique(y)) == 2
    assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / len(y))
    assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / len(y))


def test_rate_0_is_the_identity_bit_for_bit_and_rate_1_skips_everyone():
    x = jax.random.normal(KEY, (4, 5, 6, 7))
    np.testing.assert_array_equal(apply(KEY, x, 0.0), x)
    np.testing.assert_array_equal(apply(KEY, x, 1.0), np.zeros_like(x))


def test_the_key_decides_who_is_skipped():
    first, again, other = (apply(jax.random.key(seed), ONES, 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.45 < (first != other).mean() < 0.55


def test_the_rate_grows_linearly_to_that_of_the_last_branch():
    assert [depth_rate(0.5, number, 4) for number in (1, 2, 3, 4)] == [0.125, 0.25, 0.375, 0.5]
    assert depth_rate(jnp.float32(0.5), 1, 2) == 0.25
