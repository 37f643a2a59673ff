"""Penalties: their values by hand, their gradients in closed form and by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax import penalties


def l2_sp(params, names, strength):
    start = {name: jnp.full_like(leaf, 0.25) for name, leaf in params.items()}
    return penalties.l2_sp(params, names, strength, start)


PENALTIES = {
    'l2': penalties.l2,
    'l1': penalties.l1,
    'orthogonality': penalties.orthogonality,
    'l2_sp': l2_sp,
}


def drawn(seed, shape=(3, 4)):
    draw = np.random.default_rng(seed)
    return {name: jnp.float32(draw.normal(size=shape)) for name in 'abc'}


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-6, 1), st.integers(0, 2**31))
def test_l2_is_lambda_times_the_sum_of_squares_of_the_named(strength, seed):
    weights = drawn(seed)
    expected = strength * sum((np.float64(weights[name]) ** 2).sum() for name in 'ac')
    np.testing.assert_allclose(penalties.l2(weights, 'ac', strength), expected, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-6, 1), st.integers(0, 2**31))
def test_l1_is_lambda_times_the_sum_of_magnitudes_of_the_named(strength, seed):
    weights = drawn(seed)
    expected = strength * sum(np.abs(np.float64(weights[name])).sum() for name in 'ac')
    np.testing.assert_allclose(penalties.l1(weights, 'ac', strength), expected, rtol=1e-5)


def test_gradient_of_l2_is_two_lambda_w():
    gradient = jax.grad(penalties.l2)({'k': jnp.array([1.0, -2.0])}, ['k'], 0.25)
    np.testing.assert_array_equal(gradient['k'], [0.5, -1.0])


def test_gradient_of_l1_is_lambda_times_the_sign():
    gradient = jax.grad(penalties.l1)({'k': jnp.array([1.0, 0.0, -2.0])}, ['k'], 0.25)
    np.testing.assert_array_equal(gradient['k'], [0.25, 0.0, -0.25])


@pytest.mark.parametrize('shape', [(3, 3, 2, 5), (1, 1, 2, 6), (4, 4)])
def test_gradient_of_orthogonality_is_the_papers(shape):
    weights = drawn(0, shape)
    gradient = jax.grad(penalties.orthogonality)(weights, 'a', 0.5)['a']
    matrix = np.float64(weights['a']).reshape(-1, shape[-1])
    expected = 4 * 0.5 * matrix @ (matrix.T @ matrix - np.eye(shape[-1]))
    np.testing.assert_allclose(gradient.reshape(matrix.shape), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [(3, 3, 2, 5), (1, 1, 2, 6)])
def test_orthogonal_filters_cost_nothing(shape):
    flat = (int(np.prod(shape[:-1])), shape[-1])
    matrix, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(max(flat), min(flat))))
    kernel = (matrix if flat[0] > flat[1] else matrix.T).reshape(shape)
    cost = penalties.orthogonality({'k': jnp.float32(kernel)}, ['k'], 1.0)
    assert float(cost) == pytest.approx(0, abs=1e-10)


def test_orthogonality_leaves_biases_alone():
    assert penalties.orthogonality({'b': jnp.ones(3)}, ['b'], 1.0) == 0


def test_l2_sp_is_zero_at_the_start_and_pulls_back_to_it():
    start = drawn(0)
    assert penalties.l2_sp(start, 'ab', 0.5, start) == 0
    moved = jax.tree.map(lambda w: w + 0.25, start)
    gradient = jax.grad(penalties.l2_sp)(moved, 'ab', 0.5, start)
    np.testing.assert_allclose(gradient['a'], 2 * 0.5 * 0.25, rtol=1e-5)
    np.testing.assert_array_equal(gradient['c'], 0)


@pytest.mark.parametrize('name', PENALTIES)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_gradients_are_those_of_finite_differences(name, seed):
    draw = np.random.default_rng(seed)
    at, along, small = *draw.normal(size=(2, 2, 3)), 1e-2
    at += 0.1 * np.sign(at)  # away from the corner of L1

    def cost(steps):
        weights = {'k': jnp.float32(at + steps * small * along)}
        return float(PENALTIES[name](weights, ['k'], 1.0))

    gradient = jax.grad(PENALTIES[name])({'k': jnp.float32(at)}, ['k'], 1.0)['k']
    # Exact for polynomials up to the fourth degree.
    expected = (8 * (cost(1) - cost(-1)) - (cost(2) - cost(-2))) / (12 * small)
    np.testing.assert_allclose(np.sum(gradient * along), expected, atol=1e-3 * (1 + cost(0)))


@pytest.mark.parametrize('name', PENALTIES)
def test_no_named_parameter_costs_nothing_and_a_strength_may_be_traced(name):
    weights = drawn(1)
    assert PENALTIES[name](weights, [], 1.0) == 0
    traced = jax.jit(lambda strength: PENALTIES[name](weights, 'a', strength))
    np.testing.assert_allclose(traced(0.3), 0.3 * traced(1.0), rtol=1e-6)
