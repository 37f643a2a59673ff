"""Laws that all noises share, then those of each, and of their random bits."""

import itertools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from cnn_jax import nn
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.nn.noise import normal

KEY = jax.random.key(0)
ONES = np.ones((512, 512), np.float32)
MAPS = np.ones((128, 3, 2, 256), np.float32)
SPECIAL = jnp.array([[0.1, -0.0, 3e38, 1e-37, jnp.inf], [jnp.nan, 1, 2, 3, 4]])

MASKS = {
    'dropout': nn.dropout,
    'channel': nn.channel_dropout,
    'depth': nn.stochastic_depth,
    'block': nn.drop_block,
}
NOISES = MASKS | {'gaussian': nn.gaussian_dropout, 'added': nn.add_noise}
over_masks = pytest.mark.parametrize('noise', [*map(jax.jit, MASKS.values())], ids=MASKS)
over_noises = pytest.mark.parametrize('noise', [*map(jax.jit, NOISES.values())], ids=NOISES)
dropout, block = jax.jit(nn.dropout), jax.jit(nn.drop_block, static_argnums=3)


def gradient(noise, x, rate):
    return jax.grad(lambda x: noise(KEY, x, rate).sum())(x)


@over_noises
def test_rate_0_is_the_identity_bit_for_bit_with_its_gradient(noise):
    x = SPECIAL.reshape(2, 5, 1, 1)
    y = noise(KEY, x, 0.0)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32))
    np.testing.assert_array_equal(gradient(noise, x, 0.0), np.ones_like(x))


def test_noise_of_strength_0_is_the_identity_without_a_branch_too():
    x = SPECIAL.reshape(2, 5, 1, 1)
    with compiling_for('gpu'):
        y = jax.jit(lambda x: nn.add_noise(KEY, x, 0.0))(x)
        np.testing.assert_array_equal(gradient(nn.add_noise, x, 0.0), np.ones_like(x))
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32))


@over_masks
def test_rate_1_is_zero_and_so_is_its_gradient(noise):
    x = jnp.full((2, 3, 3, 2), jnp.inf)
    np.testing.assert_array_equal(noise(KEY, x, 1.0), np.zeros_like(x))
    np.testing.assert_array_equal(gradient(noise, jnp.ones_like(x), 1.0), np.zeros_like(x))


@over_noises
def test_the_key_decides_and_one_compilation_serves_every_rate(noise):
    x = jnp.ones((32, 9, 9, 8))
    first, again, other = (noise(jax.random.key(seed), x, 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3
    compiled = noise._cache_size()
    for rate in (0.0, 0.1, 0.9):
        assert np.isfinite(noise(KEY, x, rate)).all()
    assert noise._cache_size() == compiled


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg', 'unsafe_rbg'])
@over_noises
def test_keys_of_every_kind_typed_or_raw(noise, impl):
    key, x = jax.random.key(3, impl=impl), jnp.ones((64, 9, 9, 8))
    y = noise(key, x, 0.5)
    assert float(y.std()) > 0.1
    assert abs(float(y.mean()) - 1) < 0.3
    with jax.default_prng_impl(impl):
        np.testing.assert_array_equal(noise(jax.random.key_data(key), x, 0.5), y)


@over_masks
def test_a_higher_rate_drops_a_superset(noise):
    x = jnp.ones((32, 10, 10, 8))
    assert ((noise(KEY, x, 0.6) > 0) <= (noise(KEY, x, 0.3) > 0)).all()


@over_noises
def test_bfloat16_keeps_its_type_and_mean(noise):
    x = jnp.ones((1024, 4, 4, 16), jnp.bfloat16)
    y = noise(KEY, x, 0.25)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32).mean(), 1, atol=0.05)


@over_noises
def test_noise_is_affine_in_its_input_in_forward_and_reverse_mode(noise):
    """The tangent is the derivative's, and both modes agree; the second derivative is zero."""
    x, dx, dy = (jax.random.normal(jax.random.key(i), (4, 6, 6, 3)) for i in range(3))

    def function(x):
        return noise(KEY, x, 0.4)

    y, tangent = jax.jvp(function, (x,), (dx,))
    (cotangent,) = jax.vjp(function, x)[1](dy)
    np.testing.assert_allclose(jnp.vdot(tangent, dy), jnp.vdot(dx, cotangent), rtol=1e-4)
    np.testing.assert_allclose(tangent, function(x + dx) - y, rtol=1e-3, atol=1e-4)
    second = jax.jvp(lambda x: jax.jvp(function, (x,), (dx,))[1], (x,), (dx,))[1]
    np.testing.assert_array_equal(second, np.zeros_like(second))


@pytest.mark.parametrize('noise', NOISES.values(), ids=NOISES)
def test_as_a_layer_it_is_the_identity_at_inference_and_needs_no_key(noise):
    layer, x = nn.Dropout(0.5, noise), jnp.ones((8, 4, 4, 2))
    assert layer.apply({}, x, train=False) is x
    assert layer.apply({}, x, deterministic=True) is x
    ours = layer.apply({}, x, train=True, rngs={'dropout': KEY})
    theirs = layer.apply({}, x, deterministic=False, rngs={'dropout': KEY})
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != x).any()
    with pytest.raises(TypeError, match='deterministic'):
        layer.apply({}, x)


@settings(max_examples=8, deadline=None)
@given(rate=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_mean_and_variance_of_dropout(rate, seed):
    """E[y] = x and Var[y] = x²·r/(1−r), each within five standard errors of 2¹⁸ draws."""
    check_moments(dropout(jax.random.key(seed), 3 * ONES, rate), rate)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_mean_and_variance_of_whole_channels_and_branches(rate):
    channels = jax.jit(nn.channel_dropout)(KEY, 3 * MAPS, rate)
    np.testing.assert_array_equal(channels, np.broadcast_to(channels[:, :1, :1], MAPS.shape))
    check_moments(channels[:, 0, 0], rate)
    branches = jax.jit(nn.stochastic_depth)(KEY, np.full((2**14, 2, 1, 3), 3, np.float32), rate)
    np.testing.assert_array_equal(
        branches, np.broadcast_to(branches[:, :1, :1, :1], (2**14, 2, 1, 3))
    )
    check_moments(branches[:, 0, 0, 0], rate)


def check_moments(y, rate, x=3.0):
    y = np.asarray(y, np.float64)
    variance = x**2 * rate / (1 - rate)
    assert abs(y.mean() - x) < 5 * np.sqrt(variance / y.size)
    fourth = x**4 * (rate + (1 - rate) * (rate / (1 - rate)) ** 4)
    error = np.sqrt(max(fourth - variance**2, 0) / y.size)
    assert abs(((y - x) ** 2).mean() - variance) < 5 * error + 1e-3 * variance


@pytest.mark.parametrize(
    ('noise', 'layer', 'x', 'draws'),
    [
        (nn.dropout, keras.layers.Dropout, ONES, ONES.size),
        (nn.channel_dropout, keras.layers.SpatialDropout2D, MAPS, 128 * 256),
        (nn.gaussian_dropout, keras.layers.GaussianDropout, ONES, ONES.size),
    ],
)
def test_spreads_as_keras_does(noise, layer, x, draws):
    """Other draws, the same values of masks, and nearly the same mean and deviation."""
    ours = np.asarray(jax.jit(noise)(KEY, x, 0.25))
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        theirs = np.asarray(layer(0.25, seed=0)(x, training=True))
    if noise is not nn.gaussian_dropout:
        np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)
        assert set(np.unique(ours)) == {0, np.float32(1 / 0.75)}
    assert abs(ours.mean() - theirs.mean()) < 5 * np.sqrt(2 * 0.25 / 0.75 / draws)
    assert abs(ours.std() / theirs.std() - 1) < 5 / np.sqrt(draws)


def test_elements_channels_and_examples_are_dropped_independently():
    """The two halves of one random word make two elements."""
    kept = np.asarray(dropout(KEY, ONES, 0.5)) > 0
    channels = np.asarray(jax.jit(nn.channel_dropout)(KEY, MAPS, 0.5))[:, 0, 0] > 0
    for rows in (kept.T, channels, channels.T):
        correlation = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
        assert abs(correlation).max() < 6 / np.sqrt(rows.shape[1])


def share_dropped(rate, height, width, side):
    """The probability that `drop_block` drops each pixel, from the paper's γ."""

    def positions(size, side):
        starts = range(size - side + 1)
        return np.array([sum(s <= i < s + side for s in starts) for i in range(size)])

    tall, wide = min(side, height), min(side, width)
    places = (height - tall + 1) * (width - wide + 1)
    gamma = min(rate / (tall * wide) * height * width / places, 1)
    return 1 - (1 - gamma) ** np.outer(positions(height, tall), positions(width, wide))


@settings(max_examples=10, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    side=st.integers(1, 10),
    rate=st.sampled_from([0.1, 0.3, 0.9]),
)
def test_what_drop_block_drops_is_a_union_of_squares(height, width, side, rate):
    """Each dropped pixel lies in a k×k square, clipped to the map, that is dropped entirely."""
    dropped = np.asarray(block(KEY, jnp.ones((2, height, width, 3)), rate, side)) == 0
    tall, wide = min(side, height), min(side, width)
    covered = np.zeros_like(dropped)
    for i, j in itertools.product(range(height - tall + 1), range(width - wide + 1)):
        square = dropped[:, i : i + tall, j : j + wide].all(axis=(1, 2), keepdims=True)
        covered[:, i : i + tall, j : j + wide] |= square
    np.testing.assert_array_equal(covered, dropped)


@pytest.mark.parametrize(('height', 'width', 'side'), [(6, 6, 3), (5, 9, 4), (3, 4, 7), (4, 4, 1)])
@pytest.mark.parametrize('rate', [0.1, 0.5, 1.0])
def test_each_pixel_is_dropped_as_often_as_the_formula_says(height, width, side, rate):
    """Pixel by pixel, within five standard errors of 20,000 maps."""
    dropped = np.asarray(block(KEY, jnp.ones((200, height, width, 100)), rate, side)) == 0
    expected = share_dropped(rate, height, width, side)
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert (abs(dropped.mean(axis=(0, 3)) - expected) <= 5 * error + 1e-6).all()


def test_drop_block_keeps_the_mean_of_a_constant_batch_exactly():
    """y = x·m·count(m)/Σm, whatever the mask."""
    y = block(KEY, jnp.full((16, 8, 8, 4), 3.0), 0.5, 3)
    assert 0 < (np.asarray(y) == 0).mean() < 0.5
    np.testing.assert_allclose(np.asarray(y, np.float64).mean(), 3, rtol=1e-6)
    assert len(np.unique(y)) == 2


def test_normal_numbers_have_the_moments_and_the_tails_of_a_normal():
    z = np.asarray(normal(KEY, (1024, 1024)), np.float64)
    error = 1 / 1024
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * error * np.sqrt(variance)
    for bound, share in ((1, 0.317311), (2, 0.045500), (3, 0.0026998)):
        assert abs((abs(z) > bound).mean() - share) < 5 * error * np.sqrt(share)
    assert 4 < abs(z).max() < 5.4


@pytest.mark.parametrize(('noise', 'factor'), [(nn.gaussian_dropout, 3.0), (nn.add_noise, 1.0)])
def test_normal_noise_has_the_given_deviation(noise, factor):
    """√(r/(1−r)) of the input where it multiplies, σ where it is added."""
    noisy = np.asarray(jax.jit(noise)(KEY, 3 * ONES, 0.2), np.float64) - 3
    deviation = factor * 0.5 if noise is nn.gaussian_dropout else 0.2
    assert abs(noisy.mean()) < 5 * deviation / np.sqrt(ONES.size)
    assert abs(noisy.std() / deviation - 1) < 5 / np.sqrt(2 * ONES.size)


def test_bits_are_the_first_words_that_jax_draws():
    """jax.extend.random's Threefry, of the counters (0, 0), (0, 1), …"""
    key, count = jax.random.key(7), 30
    counters = jnp.concatenate([jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)])
    expected = threefry_2x32(jax.random.key_data(key), counters)[:count]
    np.testing.assert_array_equal(nn.random_bits(key, (2, 3, 5)).ravel(), expected)
    other = jax.random.key(7, impl='rbg')
    np.testing.assert_array_equal(nn.random_bits(other, (9,)), jax.random.bits(other, (9,)))


def test_salmons_known_answer():
    """From the authors' test vectors (kat_vectors, threefry2x32, 20 rounds, all zero)."""
    key = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl='threefry2x32')
    assert nn.random_bits(key, (1,)).item() == 0x6B200159
