"""RandAugment and TrivialAugment: each operation, the draws, and what strength 0 means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnn_jax.data import policies
from cnn_jax.data.policies import RANDAUGMENT, TRIVIALAUGMENT

KEY = jax.random.key(0)
SPACES = {'rand': RANDAUGMENT, 'trivial': TRIVIALAUGMENT}
X = np.random.default_rng(0).integers(40, 200, (24, 24, 3), np.uint8)
GREY = X[..., :1]
NAMES = policies.operations(3)
NO_STRENGTH = ('autocontrast', 'equalize')


@functools.partial(jax.jit, static_argnames='space')
def one(image, chosen, level, sign, space='rand'):
    return policies.operate(image, chosen, level, sign, SPACES[space])


def operate(name, level, sign=1.0, space='rand'):
    return np.asarray(one(X, jnp.int32(NAMES.index(name)), level, sign, space))


def pillow(function, *arguments):
    return np.asarray(function(Image.fromarray(X), *arguments))


def test_the_list_is_randaugments_and_grey_images_lack_saturation():
    assert len(NAMES) == len(set(NAMES)) == 14
    assert set(NAMES) - set(policies.operations(1)) == {'saturation'}


@pytest.mark.parametrize('name', [name for name in NAMES if name not in NO_STRENGTH])
def test_level_0_changes_no_bit(name):
    for sign in (1.0, -1.0):
        np.testing.assert_array_equal(operate(name, 0.0, sign), X)


@pytest.mark.parametrize(
    ('name', 'level', 'expected'),
    [
        ('identity', 1.0, lambda: X),
        ('posterize', 0.5, lambda: pillow(ImageOps.posterize, 6)),
        ('posterize', 1.0, lambda: pillow(ImageOps.posterize, 4)),
        ('solarize', 0.25, lambda: pillow(ImageOps.solarize, 192)),
        ('solarize', 1.0, lambda: 255 - X),
        ('equalize', 0.3, lambda: pillow(ImageOps.equalize)),
    ],
)
def test_tone_is_pillows(name, level, expected):
    np.testing.assert_array_equal(operate(name, level), expected())


@pytest.mark.parametrize('sign', [1.0, -1.0])
@pytest.mark.parametrize(
    ('name', 'pillows'),
    [
        ('brightness', 'Brightness'),
        ('saturation', 'Color'),
        ('contrast', 'Contrast'),
        ('sharpness', 'Sharpness'),
    ],
)
def test_enhancements_are_pillows_at_1_plus_or_minus_0_9_m_over_30(name, pillows, sign):
    enhance = getattr(ImageEnhance, pillows)(Image.fromarray(X)).enhance
    expected = np.asarray(enhance(1 + sign * 0.9 * 9 / 30)).astype(int)
    assert np.abs(operate(name, 9 / 30, sign) - expected).max() <= 2


def test_a_quarter_turn_lies_in_trivialaugments_space():
    np.testing.assert_array_equal(operate('rotate', 90 / 135, 1.0, 'trivial'), np.rot90(X))


def test_translations_go_as_far_as_the_papers():
    moved = operate('translate_x', 3 / (24 * 150 / 331), -1.0)
    np.testing.assert_array_equal(moved[:, 3:], X[:, :-3])
    assert not moved[:, :3].any()
    moved = operate('translate_y', 5 / 24, 1.0, 'trivial')
    np.testing.assert_array_equal(moved[:-5], X[5:])
    assert not moved[-5:].any()


@jax.jit
def rand(keys, image, magnitude):
    return jax.vmap(lambda k: policies.rand_augment(k, image, 1, magnitude))(keys)


@jax.jit
def trivial(keys, image, rate):
    return jax.vmap(lambda k: policies.trivial_augment(k, image, rate))(keys)


def test_rate_0_changes_no_bit():
    keys = jax.random.split(KEY, 50)
    assert (np.asarray(trivial(keys, X, 0.0)) == X).all()


def test_magnitude_0_leaves_all_but_what_has_no_strength():
    results = np.asarray(rand(jax.random.split(KEY, 300), X, 0.0))
    possible = {X.tobytes(), *(operate(name, 0.0).tobytes() for name in NO_STRENGTH)}
    assert {result.tobytes() for result in results} == possible


def test_operations_are_drawn_uniformly():
    """Magnitude and signs give each operation but the four without a sign two results."""
    count = 1400
    found = {}
    for result in np.asarray(rand(jax.random.split(KEY, count), X, 9.0)):
        found[result.tobytes()] = found.get(result.tobytes(), 0) + 1
    drawn = {}
    for name in NAMES:
        results = {operate(name, np.float32(9.0) / 30, sign).tobytes() for sign in (1.0, -1.0)}
        drawn[name] = sum(found.get(result, 0) for result in results)
    assert sum(drawn.values()) == count
    assert all(abs(n - count / 14) < 5 * np.sqrt(count / 14) for n in drawn.values()), drawn


def test_one_compilation_serves_all_strengths():
    rand.clear_cache()
    for magnitude in (0.0, 9.0, 30.0):
        rand(KEY[None], X, magnitude)
    assert rand._cache_size() == 1


def test_grey_images_stay_grey_and_8_bit():
    results = trivial(jax.random.split(KEY, 20), GREY, 1.0)
    assert results.shape == (20, 24, 24, 1)
    assert results.dtype == np.uint8
    assert len({np.asarray(result).tobytes() for result in results}) > 10
