"""Tone curves against Pillow's ImageOps."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cnn_jax.data import policies as tone

few = settings(max_examples=25)
autocontrast, equalize = jax.jit(tone.autocontrast), jax.jit(tone.equalize)
posterize, solarize = jax.jit(tone.posterize), jax.jit(tone.solarize)


def pixels(seed, channels=3, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (28, 28, channels), np.uint8)


def by_pillow(function, x, *arguments):
    image = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
    return np.asarray(function(image, *arguments)).reshape(x.shape)


ranges = st.tuples(st.integers(0, 255), st.integers(1, 256)).map(
    lambda pair: (min(pair[0], pair[1] - 1), max(pair[0] + 1, pair[1]))
)


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), ranges)
@few
def test_equalize_is_pillows(seed, channels, levels):
    x = pixels(seed, channels, *levels)
    np.testing.assert_array_equal(equalize(x), by_pillow(ImageOps.equalize, x))


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), ranges)
@few
def test_autocontrast_is_pillows_but_for_its_rounding(seed, channels, levels):
    x = pixels(seed, channels, *levels)
    result = np.asarray(autocontrast(x)).astype(int)
    low, high = (f(x.astype(int), (0, 1)) for f in (np.min, np.max))
    np.testing.assert_array_equal(
        result, np.where(high > low, 255 * (x - low) // np.maximum(high - low, 1), x)
    )
    assert np.abs(result - by_pillow(ImageOps.autocontrast, x)).max() <= 1


@pytest.mark.parametrize('bits', range(1, 9))
def test_posterize_is_pillows(bits):
    x = pixels(0)
    np.testing.assert_array_equal(posterize(x, 8 - bits), by_pillow(ImageOps.posterize, x, bits))


@pytest.mark.parametrize('threshold', [0, 1, 128, 255, 256])
def test_solarize_is_pillows(threshold):
    x = pixels(0)
    np.testing.assert_array_equal(
        solarize(x, float(threshold)), by_pillow(ImageOps.solarize, x, threshold)
    )


def test_strength_0_changes_no_bit():
    x = pixels(0)
    np.testing.assert_array_equal(posterize(x, 0), x)
    np.testing.assert_array_equal(solarize(x, 256.0), x)


@pytest.mark.parametrize('level', [0, 77, 255])
def test_a_constant_image_stays(level):
    x = np.full((5, 5, 3), level, np.uint8)
    np.testing.assert_array_equal(autocontrast(x), x)
    np.testing.assert_array_equal(equalize(x), x)
