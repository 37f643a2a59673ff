"""Laws of DropBlock: squares, the share that they cover, the scale, and its ends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.nn.noise import drop_block

KEY = jax.random.key(0)
apply = jax.jit(drop_block, static_argnums=3)


def positions(size, side):
    """On how many positions of a run of `side` each pixel of a line depends."""
    starts = range(size - side + 1)
    return np.array([sum(s <= i < s + side for s in starts) for i in range(size)])


def share_dropped(rate, height, width, side):
    """The probability that a pixel is dropped, from the paper's γ."""
    tall, wide = min(side, height), min(side, width)
    places = (height - tall + 1) * (width - wide + 1)
    gamma = min(rate / (tall * wide) * height * width / places, 1)
    count = np.outer(positions(height, tall), positions(width, wide))
    return 1 - (1 - gamma) ** count


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    side=st.integers(1, 10),
    rate=st.sampled_from([0.1, 0.3, 0.9]),
)
def test_what_is_dropped_is_a_union_of_squares(height, width, side, rate):
    """Each dropped pixel lies in a k×k square, clipped to the map, that is dropped entirely."""
    dropped = np.asarray(apply(KEY, jnp.ones((2, height, width, 3)), rate, side)) == 0
    tall, wide = min(side, height), min(side, width)
    covered = np.zeros_like(dropped)
    corners = itertools.product(range(height - tall + 1), range(width - wide + 1))
    for i, j in corners:
        square = dropped[:, i : i + tall, j : j + wide].all(axis=(1, 2), keepdims=True)
        covered[:, i : i + tall, j : j + wide] |= square
    np.testing.assert_array_equal(covered, dropped)


@pytest.mark.parametrize('side', [1, 2, 3, 4, 7, 8])
def test_a_single_seed_makes_a_single_square(side):
    """At a rate so low that most maps lose nothing, those that lose something lose k² pixels."""
    dropped = np.asarray(apply(KEY, jnp.ones((50, 12, 12, 40)), 0.002 * side, side)) == 0
    sizes = dropped.sum(axis=(1, 2)).ravel()
    assert (sizes == side**2).sum() > 0.8 * (sizes > 0).sum() > 0


@pytest.mark.parametrize(('height', 'width', 'side'), [(6, 6, 3), (5, 9, 4), (3, 4, 7), (4, 4, 1)])
@pytest.mark.parametrize('rate', [0.1, 0.5, 1.0])
def test_each_pixel_is_dropped_as_often_as_the_formula_says(height, width, side, rate):
    """Pixel by pixel, within five standard errors of 20,000 maps."""
    dropped = np.asarray(apply(KEY, jnp.ones((200, height, width, 100)), rate, side)) == 0
    expected = share_dropped(rate, height, width, side)
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert (abs(dropped.mean(axis=(0, 3)) - expected) <= 5 * error + 1e-6).all()


def test_the_mean_of_a_constant_batch_stays_exact():
    """y = x·m·count(m)/Σm, whatever the mask."""
    y = apply(KEY, jnp.full((16, 8, 8, 4), 3.0), 0.5, 3)
    assert 0 < (np.asarray(y) == 0).mean() < 0.5
    np.testing.assert_allclose(np.asarray(y, np.float64).mean(), 3, rtol=1e-6)
    assert len(np.unique(y)) == 2


def test_a_square_as_large_as_the_map_drops_channels_at_the_given_rate():
    y = np.asarray(apply(KEY, jnp.ones((100, 4, 5, 100)), 0.25, 7))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert abs((y[:, 0, 0] == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 1e4)


def test_rate_0_is_the_identity_bit_for_bit_with_its_gradient():
    x = jax.random.normal(KEY, (4, 8, 8, 3))
    np.testing.assert_array_equal(apply(KEY, x, 0.0, 7), x)
    gradient = jax.grad(lambda x: drop_block(KEY, x, 0.0, 7).sum())(x)
    np.testing.assert_array_equal(gradient, np.ones_like(x))


def test_where_everything_is_dropped_the_result_is_zero():
    x = jnp.full((2, 3, 3, 2), jnp.inf)
    np.testing.assert_array_equal(apply(KEY, x, 1.0, 3), np.zeros_like(x))


def test_the_key_decides_the_mask_and_a_higher_rate_drops_a_superset():
    x = jnp.ones((8, 10, 10, 8))
    first, again, other = (apply(jax.random.key(seed), x, 0.3, 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert ((apply(KEY, x, 0.6, 3) > 0) <= (apply(KEY, x, 0.3, 3) > 0)).all()


def test_one_compilation_serves_every_rate():
    traces = []

    @jax.jit
    def step(x, rate):
        traces.append(rate)
        return drop_block(KEY, x, rate)

    for rate in (0.0, 0.1, 1.0):
        assert np.isfinite(step(jnp.ones((2, 9, 9, 2)), rate)).all()
    assert len(traces) == 1


def test_bfloat16_keeps_its_type_and_mean():
    y = apply(KEY, jnp.ones((64, 16, 16, 16), jnp.bfloat16), 0.25, 5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32).mean(), 1, atol=5e-3)
