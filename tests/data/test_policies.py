"""Operations on images against Pillow, SciPy and torchvision's formulas; the policies' draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from cnn_jax.data import policies
from cnn_jax.data.policies import RANDAUGMENT, TRIVIALAUGMENT

KEY = jax.random.key(0)
few = settings(max_examples=25)


def noise(height=24, width=24, channels=3, low=0, high=256, seed=0):
    return np.random.default_rng(seed).integers(low, high, (height, width, channels), np.uint8)


def by_pillow(function, x, *arguments):
    image = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
    return np.asarray(function(image, *arguments)).reshape(x.shape)


# Affine maps.

affine = jax.jit(policies.affine)


@pytest.mark.parametrize('side', [6, 7])
@pytest.mark.parametrize('quarters', [-1, 1, 2, 3, 4])
def test_quarter_turns_are_rot90(side, quarters):
    x = noise(side, side).astype(np.float32)
    turned = affine(x, policies.rotation(90.0 * quarters))
    np.testing.assert_allclose(turned, np.rot90(x, quarters), atol=1e-2)


@pytest.mark.parametrize('matrix', [policies.rotation(23.0), policies.shear(0.3, -0.2)])
def test_between_pixels_it_samples_as_scipy(matrix):
    x = noise(8, 11, 1).astype(np.float32)
    m, middle = np.asarray(matrix, np.float64), np.array([3.5, 5.0])
    offset = middle - m[:, :2] @ middle + m[:, 2]
    options = {'order': 1, 'mode': 'grid-constant', 'cval': 0}
    expected = ndimage.affine_transform(x[..., 0].astype(np.float64), m[:, :2], offset, **options)
    np.testing.assert_allclose(affine(x, matrix)[..., 0], expected, atol=1e-2)


def test_integers_are_rounded_and_clipped_to_their_range():
    x = jnp.array([-3.0, 0.4, 0.6, 254.6, 300.0])
    assert policies.as_type(x, jnp.uint8).tolist() == [0, 0, 1, 255, 255]


# Colours. torchvision.transforms._functional_tensor, images in [0, bound]:
#   _blend(img1, img2, ratio) = (ratio * img1 + (1.0 - ratio) * img2).clamp(0, bound)
#   rgb_to_grayscale = 0.2989 * r + 0.587 * g + 0.114 * b
#   adjust_brightness: _blend(img, zeros_like(img), factor)
#   adjust_contrast:   _blend(img, mean(rgb_to_grayscale(img)), factor); of 1 channel, mean(img)
#   adjust_saturation: _blend(img, rgb_to_grayscale(img), factor); of 1 channel, img
#   adjust_sharpness:  _blend(img, blurred, factor), blurred by [[1,1,1],[1,5,1],[1,1,1]]/13
#                      inside, img itself on the border
WITHOUT = {'Brightness': jnp.zeros_like, 'Contrast': policies.mean_grey}
WITHOUT |= {'Color': policies.grey, 'Sharpness': policies.smooth}


def reference(name, x, factor):
    x = x.astype(np.float64)
    grey = x if x.shape[-1] == 1 else (x @ [0.2989, 0.587, 0.114])[..., None]
    if name == 'Sharpness':
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
        other = x.copy()
        for r in range(1, x.shape[0] - 1):
            for c in range(1, x.shape[1] - 1):
                window = x[r - 1 : r + 2, c - 1 : c + 2]
                other[r, c] = (window * kernel[..., None]).sum((0, 1))
    else:
        other = {'Brightness': 0 * x, 'Contrast': grey.mean(), 'Color': grey}[name]
    return np.clip(factor * x + (1 - factor) * other, 0, 255)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', WITHOUT)
@pytest.mark.parametrize('factor', [0.0, 0.3, 1.0, 1.9])
def test_blends_are_torchvisions_and_pillows_to_its_rounding(name, factor, channels):
    x = noise(7, 9, channels)
    pixels = x.astype(np.float32)
    result = np.asarray(policies.blend(pixels, WITHOUT[name](pixels), factor))
    np.testing.assert_allclose(result, reference(name, pixels, factor), atol=1e-3)
    if channels == 3:
        enhanced = getattr(ImageEnhance, name)(Image.fromarray(x)).enhance(factor)
        assert np.abs(result - np.asarray(enhanced, np.float64)).max() <= 1.5


@jax.jit
def jittered(key, x, brightness=0.0, contrast=0.0, saturation=0.0):
    return policies.jitter(key, x, brightness, contrast, saturation)


@pytest.mark.parametrize(('channels', 'saturation'), [(1, 0.0), (3, 0.0), (1, 0.9)])
def test_strength_0_and_saturation_of_grey_images_change_no_bit(channels, saturation):
    x = noise(7, 9, channels).astype(np.float32)
    np.testing.assert_array_equal(jittered(KEY, x, 0.0, 0.0, saturation), x)


def test_factors_are_uniform_in_their_range_and_never_negative():
    x = np.full((1, 1, 1), 100, np.float32)
    keys = jax.random.split(KEY, 2000)
    factors = np.asarray(jax.vmap(lambda key: jittered(key, x, 0.4))(keys)).ravel() / 100
    assert factors.min() >= 0.6 - 1e-6
    assert factors.max() <= 1.4 + 1e-6
    assert abs(factors.mean() - 1) < 5 * 0.8 / np.sqrt(12 * 2000)
    assert factors.var() == pytest.approx(0.8**2 / 12, rel=0.1)
    assert np.asarray(jax.vmap(lambda key: jittered(key, x, 5.0))(keys[:50])).min() >= 0


def test_the_order_of_jitter_is_brightness_contrast_saturation():
    x = noise(7, 9).astype(np.float32)
    draws = np.asarray(jax.random.uniform(KEY, (3,)), np.float64)
    expected = x
    for name, draw, strength in zip(('Brightness', 'Contrast', 'Color'), draws, (0.8, 0.5, 0.3)):
        expected = reference(name, expected, 1 - strength + draw * 2 * strength)
    np.testing.assert_allclose(jittered(KEY, x, 0.8, 0.5, 0.3), expected, atol=1e-3)


# Tone curves.

autocontrast, equalize = jax.jit(policies.autocontrast), jax.jit(policies.equalize)
posterize, solarize = jax.jit(policies.posterize), jax.jit(policies.solarize)
ranges = st.tuples(st.integers(0, 255), st.integers(1, 256)).map(
    lambda pair: (min(pair[0], pair[1] - 1), max(pair[0] + 1, pair[1]))
)


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), ranges)
@few
def test_equalize_is_pillows(seed, channels, levels):
    x = noise(28, 28, channels, *levels, seed)
    np.testing.assert_array_equal(equalize(x), by_pillow(ImageOps.equalize, x))


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), ranges)
@few
def test_autocontrast_is_pillows_but_for_its_rounding(seed, channels, levels):
    x = noise(28, 28, channels, *levels, seed)
    result = np.asarray(autocontrast(x)).astype(int)
    low, high = (f(x.astype(int), (0, 1)) for f in (np.min, np.max))
    stretched = 255 * (x - low) // np.maximum(high - low, 1)
    np.testing.assert_array_equal(result, np.where(high > low, stretched, x))
    assert np.abs(result - by_pillow(ImageOps.autocontrast, x)).max() <= 1


# Policies.

X = noise(low=40, high=200)
SPACES = {'rand': RANDAUGMENT, 'trivial': TRIVIALAUGMENT}
NAMES = policies.operations(3)
NO_STRENGTH = ('autocontrast', 'equalize')


@functools.partial(jax.jit, static_argnames='space')
def one(image, chosen, level, sign, space='rand'):
    return policies.operate(image, chosen, level, sign, SPACES[space])


def operate(name, level, sign=1.0, space='rand'):
    return np.asarray(one(X, jnp.int32(NAMES.index(name)), level, sign, space))


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
        ('posterize', 0.5, lambda: by_pillow(ImageOps.posterize, X, 6)),
        ('posterize', 1.0, lambda: by_pillow(ImageOps.posterize, X, 4)),
        ('solarize', 0.25, lambda: by_pillow(ImageOps.solarize, X, 192)),
        ('solarize', 1.0, lambda: 255 - X),
        ('equalize', 0.3, lambda: by_pillow(ImageOps.equalize, X)),
    ],
)
def test_levels_of_tone_are_the_papers(name, level, expected):
    np.testing.assert_array_equal(operate(name, level), expected())


@pytest.mark.parametrize('sign', [1.0, -1.0])
@pytest.mark.parametrize('name', policies.ENHANCE)
def test_enhancements_are_pillows_at_1_plus_or_minus_0_9_m_over_30(name, sign):
    pillows = 'Color' if name == 'saturation' else name.capitalize()
    enhance = getattr(ImageEnhance, pillows)(Image.fromarray(X)).enhance
    expected = np.asarray(enhance(1 + sign * 0.9 * 9 / 30)).astype(int)
    assert np.abs(operate(name, 9 / 30, sign) - expected).max() <= 2


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


def test_magnitude_0_leaves_all_but_the_operations_without_strength():
    results = np.asarray(rand(jax.random.split(KEY, 300), X, 0.0))
    possible = {X.tobytes(), *(operate(name, 0.0).tobytes() for name in NO_STRENGTH)}
    assert {result.tobytes() for result in results} == possible


def test_operations_are_drawn_uniformly():
    """Magnitude and signs give each operation but the four without a sign two results."""
    count = 1400
    seen = {}
    for result in np.asarray(rand(jax.random.split(KEY, count), X, 9.0)):
        seen[result.tobytes()] = seen.get(result.tobytes(), 0) + 1
    drawn = {}
    for name in NAMES:
        results = {operate(name, np.float32(9.0) / 30, sign).tobytes() for sign in (1.0, -1.0)}
        drawn[name] = sum(seen.get(result, 0) for result in results)
    assert sum(drawn.values()) == count
    assert all(abs(n - count / 14) < 5 * np.sqrt(count / 14) for n in drawn.values()), drawn


def test_trivial_augment_at_rate_0_and_on_grey_images():
    keys = jax.random.split(KEY, 20)
    assert (np.asarray(trivial(keys, X, 0.0)) == X).all()
    results = trivial(keys, X[..., :1], 1.0)
    assert (results.shape, results.dtype) == ((20, 24, 24, 1), np.uint8)
    assert len({np.asarray(result).tobytes() for result in results}) > 10
