"""Laws of dropout: its ends, its first two moments, its keys, and one compilation for all rates."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.nn.noise import Dropout, dropout

KEY = jax.random.key(0)
ONES = np.ones((512, 512), np.float32)
apply = jax.jit(dropout)
gradient = jax.jit(jax.grad(lambda x, rate: dropout(KEY, x, rate).sum()))


def test_rate_0_is_the_identity_bit_for_bit():
    x = jnp.array([[0.1, -0.0, 3e38, 1e-37, jnp.inf], [jnp.nan, 1, 2, 3, 4]])
    y = apply(KEY, x, 0.0)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32))
    np.testing.assert_array_equal(gradient(x, 0.0), np.ones_like(x))


def test_rate_1_is_zero_and_so_is_its_gradient():
    x = jnp.array([[0.1, -2.0, 3e38, jnp.inf]])
    np.testing.assert_array_equal(apply(KEY, x, 1.0), np.zeros_like(x))
    np.testing.assert_array_equal(gradient(x, 1.0), np.zeros_like(x))


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_mean_and_variance(rate, seed):
    """E[y] = x and Var[y] = x²·r/(1−r), each within five standard errors of 2¹⁸ draws."""
    count, x = 2**18, 3.0
    y = np.asarray(apply(jax.random.key(seed), x * ONES, rate), np.float64)
    variance = x**2 * rate / (1 - rate)
    assert abs(y.mean() - x) < 5 * np.sqrt(variance / count)
    fourth = x**4 * (rate + (1 - rate) * (rate / (1 - rate)) ** 4)
    error = np.sqrt(max(fourth - variance**2, 0) / count)
    assert abs(((y - x) ** 2).mean() - variance) < 5 * error + 1e-3 * variance


def test_keeps_the_same_scaled_values_as_keras():
    """Other masks, the same two values, and nearly the same share of each."""
    ours = np.asarray(apply(KEY, ONES, 0.25))
    theirs = np.asarray(keras.layers.Dropout(0.25, seed=0)(ONES, training=True))
    np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)
    assert abs(ours.mean() - theirs.mean()) < 5 * np.sqrt(2 * 0.25 / 0.75 / ONES.size)


@pytest.mark.parametrize('rate', [0.25, 0.5, 0.75])
def test_rates_in_units_of_the_resolution_are_exact(rate):
    y = apply(KEY, ONES, rate)
    assert set(np.unique(y)) == {0, np.float32(1 / (1 - rate))}


def test_neighbouring_elements_are_independent():
    """The two halves of one random word make two elements."""
    kept = np.asarray(apply(KEY, ONES, 0.5)) > 0
    correlation = np.corrcoef(kept, rowvar=False)[~np.eye(512, dtype=bool)]
    assert abs(correlation).max() < 6 / np.sqrt(512)


def test_the_key_decides_the_mask():
    first, again, other = (apply(jax.random.key(seed), ONES, 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.49 < (first != other).mean() < 0.51


def test_a_higher_rate_drops_a_superset():
    assert ((apply(KEY, ONES, 0.6) > 0) <= (apply(KEY, ONES, 0.3) > 0)).all()


@pytest.mark.parametrize('shape', [(5, 1), (2, 3, 4, 7), (4,)])
def test_any_shape(shape):
    assert apply(KEY, jnp.ones(shape), 0.5).shape == shape


def test_bfloat16_keeps_its_type_and_mean():
    y = apply(KEY, jnp.ones((1024, 1024), jnp.bfloat16), 0.5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32).mean(), 1, atol=5e-3)


def test_one_compilation_serves_every_rate():
    traces = []

    @jax.jit
    def step(x, rate):
        traces.append(rate)
        return Dropout(rate).apply({}, x, train=True, rngs={'dropout': KEY})

    for rate in (0.0, 0.1, 0.5, 1.0):
        assert np.isfinite(step(ONES, rate)).all()
    assert len(traces) == 1


def test_inference_is_the_identity_and_needs_no_key():
    x = jnp.ones((4, 4))
    assert Dropout(0.5).apply({}, x, train=False) is x


def test_the_gradient_is_the_mask_times_its_scale():
    y = apply(KEY, 3 * ONES, 0.25)
    np.testing.assert_allclose(gradient(3 * ONES, 0.25), y / 3, rtol=1e-6)
