"""Laws of normal noise: its distribution, its ends, and Keras's GaussianDropout."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from cnn_jax.nn.noise import Dropout, add_noise, gaussian_dropout, normal

KEY = jax.random.key(0)
ONES = np.ones((512, 512), np.float32)
multiply, add = jax.jit(gaussian_dropout), jax.jit(add_noise)


def test_normal_numbers_have_the_moments_and_the_tails_of_a_normal():
    z = np.asarray(normal(KEY, (1024, 1024)), np.float64)
    error = 1 / 1024
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * error * np.sqrt(variance)
    for bound, share in ((1, 0.317311), (2, 0.045500), (3, 0.0026998)):
        assert abs((abs(z) > bound).mean() - share) < 5 * error * np.sqrt(share)
    assert 4 < abs(z).max() < 5.4


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_mean_and_variance_are_those_of_dropout(rate):
    """E[y] = x and Var[y] = x²·r/(1−r), each within five standard errors of 2¹⁸ draws."""
    y = np.asarray(multiply(KEY, 3 * ONES, rate), np.float64)
    variance = 9 * rate / (1 - rate)
    assert abs(y.mean() - 3) < 5 * np.sqrt(variance / y.size)
    assert abs(((y - 3) ** 2).mean() / variance - 1) < 5 * np.sqrt(2 / y.size)


def test_spreads_as_keras_does():
    theirs = np.asarray(keras.layers.GaussianDropout(0.3, seed=0)(ONES, training=True))
    ours = np.asarray(multiply(KEY, ONES, 0.3))
    assert abs(ours.std() / theirs.std() - 1) < 5 / np.sqrt(ONES.size)
    assert abs(ours.mean() - theirs.mean()) < 5 * np.sqrt(2 * 0.3 / 0.7 / ONES.size)


def test_rate_0_is_the_identity_bit_for_bit_with_its_gradient():
    x = jnp.array([[0.1, -0.0, 3e38, 1e-37, jnp.inf], [jnp.nan, 1, 2, 3, 4]])
    y = multiply(KEY, x, 0.0)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32))
    gradient = jax.grad(lambda x: gaussian_dropout(KEY, x, 0.0).sum())(x)
    np.testing.assert_array_equal(gradient, np.ones_like(x))


def test_the_gradient_is_the_factor():
    y = multiply(KEY, 3 * ONES, 0.25)
    gradient = jax.grad(lambda x: gaussian_dropout(KEY, x, 0.25).sum())(3 * ONES)
    np.testing.assert_allclose(gradient, y / 3, rtol=1e-5, atol=1e-6)


def test_added_noise_has_the_given_deviation():
    noise = np.asarray(add(KEY, 2 * ONES, 0.25), np.float64) - 2
    assert abs(noise.mean()) < 5 * 0.25 / np.sqrt(ONES.size)
    assert abs(noise.std() / 0.25 - 1) < 5 / np.sqrt(2 * ONES.size)


def test_without_deviation_nothing_is_added_bit_for_bit():
    x = jnp.array([0.1, -0.0, 3e38, jnp.inf, jnp.nan])
    y = add(KEY, x, 0.0)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32))


@pytest.mark.parametrize('noise', [gaussian_dropout, add_noise])
def test_the_key_decides_and_one_compilation_serves_every_strength(noise):
    traces = []

    @jax.jit
    def step(key, strength):
        traces.append(strength)
        return noise(key, ONES, strength)

    first, again, other = (step(jax.random.key(seed), 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    np.testing.assert_array_equal(step(KEY, 0.0), ONES)
    assert len(traces) == 1


@pytest.mark.parametrize('noise', [gaussian_dropout, add_noise])
def test_bfloat16_keeps_its_type(noise):
    assert noise(KEY, jnp.ones((4, 4), jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_as_a_layer_it_is_the_identity_at_inference():
    x = jnp.ones((4, 4))
    assert Dropout(0.5, gaussian_dropout).apply({}, x, train=False) is x
