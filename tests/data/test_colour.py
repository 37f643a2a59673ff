"""Colour against torchvision's formulas, written again in NumPy."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cnn_jax.data import policies as colour

KEY = jax.random.key(0)


def pixels(channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (7, 9, channels)).astype(np.float32)


# torchvision.transforms._functional_tensor, images in [0, bound]:
#   _blend(img1, img2, ratio) = (ratio * img1 + (1.0 - ratio) * img2).clamp(0, bound)
#   rgb_to_grayscale = 0.2989 * r + 0.587 * g + 0.114 * b
#   adjust_brightness: _blend(img, zeros_like(img), factor)
#   adjust_contrast:   _blend(img, mean(rgb_to_grayscale(img)), factor); of 1 channel, mean(img)
#   adjust_saturation: _blend(img, rgb_to_grayscale(img), factor); of 1 channel, img
#   adjust_sharpness:  _blend(img, blurred, factor), blurred by [[1,1,1],[1,5,1],[1,1,1]]/13
#                      inside, img itself on the border
def reference(name, x, factor):
    x = x.astype(np.float64)
    grey = x if x.shape[-1] == 1 else (x @ [0.2989, 0.587, 0.114])[..., None]
    if name == 'smooth':
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
        other = x.copy()
        for r in range(1, x.shape[0] - 1):
            for c in range(1, x.shape[1] - 1):
                window = x[r - 1 : r + 2, c - 1 : c + 2]
                other[r, c] = (window * kernel[..., None]).sum((0, 1))
    else:
        other = {'black': 0 * x, 'mean_grey': grey.mean(), 'grey': grey}[name]
    return np.clip(factor * x + (1 - factor) * other, 0, 255)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', ['black', 'mean_grey', 'grey', 'smooth'])
@pytest.mark.parametrize('factor', [0.0, 0.3, 1.0, 1.9])
def test_blends_are_torchvisions(name, factor, channels):
    x = pixels(channels)
    result = colour.blend(x, getattr(colour, name)(x), factor)
    np.testing.assert_allclose(result, reference(name, x, factor), atol=1e-3)


@pytest.mark.parametrize('name', ['Brightness', 'Contrast', 'Color', 'Sharpness'])
@pytest.mark.parametrize('factor', [0.4, 1.6])
def test_pillow_agrees_to_its_rounding(name, factor):
    x = pixels()
    without = {'Brightness': 'black', 'Contrast': 'mean_grey', 'Color': 'grey'}.get(name, 'smooth')
    image = Image.fromarray(x.astype(np.uint8))
    expected = np.asarray(getattr(ImageEnhance, name)(image).enhance(factor), np.float64)
    result = colour.blend(x, getattr(colour, without)(x), factor)
    assert np.abs(np.asarray(result) - expected).max() <= 1.5


@functools.partial(jax.jit, static_argnums=())
def jittered(key, x, brightness=0.0, contrast=0.0, saturation=0.0):
    return colour.jitter(key, x, brightness, contrast, saturation)


@pytest.mark.parametrize('channels', [1, 3])
def test_strength_0_changes_no_bit(channels):
    x = pixels(channels)
    np.testing.assert_array_equal(jittered(KEY, x), x)


def test_factors_are_uniform_in_their_range():
    x = np.full((1, 1, 1), 100, np.float32)
    keys = jax.random.split(KEY, 2000)
    factors = np.asarray(jax.vmap(lambda key: jittered(key, x, 0.4))(keys)).ravel() / 100
    assert factors.min() >= 0.6 - 1e-6
    assert factors.max() <= 1.4 + 1e-6
    assert abs(factors.mean() - 1) < 5 * 0.8 / np.sqrt(12 * 2000)
    assert factors.var() == pytest.approx(0.8**2 / 12, rel=0.1)


def test_the_order_is_brightness_contrast_saturation():
    x = pixels()
    draws = np.asarray(jax.random.uniform(KEY, (3,)), np.float64)
    expected = x
    for name, draw, strength in zip(('black', 'mean_grey', 'grey'), draws, (0.8, 0.5, 0.3)):
        expected = reference(name, expected, 1 - strength + draw * 2 * strength)
    np.testing.assert_allclose(jittered(KEY, x, 0.8, 0.5, 0.3), expected, atol=1e-3)


def test_strengths_above_1_reach_no_negative_factor():
    x = pixels(1)
    results = jax.vmap(lambda key: jittered(key, x, 5.0))(jax.random.split(KEY, 50))
    assert np.asarray(results).min() >= 0


def test_grey_images_have_no_saturation_to_change():
    x = pixels(1)
    np.testing.assert_array_equal(jittered(KEY, x, 0.0, 0.0, 0.9), x)
