"""Laws of channel dropout: whole channels, its moments, its ends, and Keras's layer."""

import jax
import jax.numpy as jnp
import keras
import numpy as np

from cnn_jax.nn.noise import Dropout, channel_dropout

KEY = jax.random.key(0)
ONES = np.ones((128, 3, 2, 256), np.float32)
apply = jax.jit(channel_dropout)


def test_a_channel_of_an_example_is_dropped_as_a_whole_or_not_at_all():
    y = np.asarray(apply(KEY, ONES, 0.25))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))


def test_mean_and_variance_over_channels():
    """E[y] = x and Var[y] = x²·r/(1−r), each within five standard errors of 2¹⁵ draws."""
    for rate in (0.1, 0.5, 0.9):
        y = 3 * np.asarray(apply(KEY, ONES, rate), np.float64)[:, 0, 0]
        variance = 9 * rate / (1 - rate)
        assert abs(y.mean() - 3) < 5 * np.sqrt(variance / y.size)
        fourth = 81 * (rate + (1 - rate) * (rate / (1 - rate)) ** 4)
        error = np.sqrt(max(fourth - variance**2, 0) / y.size)
        assert abs(((y - 3) ** 2).mean() - variance) < 5 * error + 1e-3 * variance


def test_channels_and_examples_are_dropped_independently():
    kept = np.asarray(apply(KEY, ONES, 0.5))[:, 0, 0] > 0
    for rows in (kept, kept.T):
        correlation = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
        assert abs(correlation).max() < 6 / np.sqrt(rows.shape[1])


def test_keeps_the_same_scaled_values_as_keras():
    ours = np.asarray(apply(KEY, ONES, 0.25))
    theirs = np.asarray(keras.layers.SpatialDropout2D(0.25, seed=0)(ONES, training=True))
    np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)
    channels = ONES.shape[0] * ONES.shape[-1]
    assert abs(ours.mean() - theirs.mean()) < 5 * np.sqrt(2 * 0.25 / 0.75 / channels)


def test_rate_0_is_the_identity_bit_for_bit_and_rate_1_is_zero():
    x = jax.random.normal(KEY, (4, 5, 6, 7))
    np.testing.assert_array_equal(apply(KEY, x, 0.0), x)
    np.testing.assert_array_equal(apply(KEY, x, 1.0), np.zeros_like(x))


def test_the_key_decides_the_mask():
    first, again, other = (apply(jax.random.key(seed), ONES, 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.45 < (first != other).mean() < 0.55


def test_bfloat16_keeps_its_type():
    assert apply(KEY, jnp.ones((2, 3, 4, 5), jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_as_a_layer_it_is_the_identity_at_inference():
    x = jnp.ones((2, 3, 4, 5))
    layer = Dropout(0.5, channel_dropout)
    assert layer.apply({}, x, train=False) is x
    y = np.asarray(layer.apply({}, x, train=True, rngs={'dropout': KEY}))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
