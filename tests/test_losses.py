"""Losses and penalties against Keras, NumPy in float64, and hand computation."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax import losses


def test_one_output_gives_both_sides_of_a_sigmoid():
    z = np.array([[-200.0], [0.0], [3.0], [200.0]], np.float32)
    log_probs = losses.log_probabilities(jnp.asarray(z))
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    np.testing.assert_allclose(np.exp(log_probs), np.hstack([1 - p, p]), rtol=1e-6, atol=1e-30)
    assert np.isfinite(log_probs).all()


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('classes', [2, 7])
def test_softmax_loss_equals_keras(smoothing, classes):
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(9, classes), scale=4).astype(np.float32)
    labels = draw.integers(classes, size=9)
    ours = losses.cross_entropy(losses.log_probabilities(logits), labels, smoothing)
    theirs = keras.losses.categorical_crossentropy(
        np.eye(classes)[labels], logits, from_logits=True, label_smoothing=smoothing
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_sigmoid_loss_equals_keras(smoothing):
    logits = np.linspace(-8, 8, 11, dtype=np.float32)[:, None]
    labels = np.arange(11) % 2
    ours = losses.cross_entropy(losses.log_probabilities(logits), labels, smoothing)
    theirs = keras.losses.binary_crossentropy(
        labels[:, None].astype(np.float32), logits, from_logits=True, label_smoothing=smoothing
    )
    np.testing.assert_allclose(ours, theirs, rtol=3e-6)


def test_uniform_prediction_costs_log_of_the_number_of_classes():
    log_probs = losses.log_probabilities(jnp.zeros((1, 10)))
    assert losses.cross_entropy(log_probs, jnp.array([3]))[0] == pytest.approx(np.log(10))


@given(st.floats(1e-6, 1), st.integers(0, 2**31))
def test_l2_is_lambda_times_the_sum_of_squares_of_the_named(strength, seed):
    draw = np.random.default_rng(seed)
    weights = {name: draw.normal(size=(3, 4)) for name in 'abc'}
    expected = strength * sum((weights[name] ** 2).sum() for name in 'ac')
    got = losses.l2_penalty(jax.tree.map(jnp.float32, weights), 'ac', strength)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradient_of_l2_is_two_lambda_w():
    w = {'k': jnp.array([1.0, -2.0])}
    gradient = jax.grad(lambda w: losses.l2_penalty(w, ['k'], 0.25))(w)
    np.testing.assert_array_equal(gradient['k'], [0.5, -1.0])


def test_no_named_parameter_gives_zero():
    assert losses.l2_penalty({'k': jnp.ones(3)}, [], 1.0) == 0
