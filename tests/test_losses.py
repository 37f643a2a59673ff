"""Losses and penalties against Keras, NumPy in float64, and hand computation."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
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


def entropy(logits):
    p = np.exp(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return -(p * np.log(p)).sum(axis=-1)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 2), st.integers(2, 9), st.integers(0, 2**31))
def test_confidence_costs_minus_the_entropy(strength, classes, seed):
    logits = np.random.default_rng(seed).normal(size=(5, classes), scale=3)
    got = losses.confidence_penalty(losses.log_probabilities(jnp.float32(logits)), strength)
    np.testing.assert_allclose(got, -strength * entropy(logits), rtol=1e-4, atol=1e-5)


def test_confidence_costs_most_where_it_is_complete_and_least_where_there_is_none():
    log_probs = losses.log_probabilities(jnp.array([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    got = losses.confidence_penalty(log_probs, 0.5)
    np.testing.assert_allclose(got, [0.0, -0.5 * np.log(3)], atol=1e-6)


def test_gradient_of_the_confidence_penalty_is_that_of_the_entropy():
    z, small = np.array([[0.3, -1.0, 2.0]]), 1e-5

    def cost(logits):
        return losses.confidence_penalty(losses.log_probabilities(logits), 1.0)[0]

    for k in range(3):
        step = small * np.eye(3)[[k]]
        expected = -(entropy(z + step) - entropy(z - step))[0] / (2 * small)
        assert jax.grad(cost)(jnp.float32(z))[0, k] == pytest.approx(expected, rel=1e-4)
