"""Preprocessing against NumPy in float64 and against Keras."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cnn_jax.pretrained.preprocessing import CAFFE, PLAIN, PREPROCESSINGS, TORCH

IMAGES = npst.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.just(3))
)


def test_one_pixel_by_hand():
    red = np.uint8([[[[255, 0, 0]]]])
    np.testing.assert_array_equal(PLAIN(red)[0, 0, 0], np.float32([1, 0, 0]))
    np.testing.assert_allclose(CAFFE(red)[0, 0, 0], [-103.939, -116.779, 131.32], rtol=1e-6)
    np.testing.assert_allclose(TORCH(red)[0, 0, 0], [2.2489, -2.0357, -1.8044], rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(IMAGES)
def test_formulas(images):
    x = images.astype(np.float64)
    torch = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    caffe = x[..., ::-1] - [103.939, 116.779, 123.68]
    np.testing.assert_allclose(TORCH(images), torch, atol=1e-6)
    np.testing.assert_allclose(CAFFE(images), caffe, atol=1e-5)
    np.testing.assert_allclose(PLAIN(images), x / 255, atol=1e-7)


@pytest.mark.parametrize(('ours', 'mode'), [(CAFFE, 'caffe'), (TORCH, 'torch')])
def test_agrees_with_keras(ours, mode):
    from keras.applications import imagenet_utils

    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    theirs = imagenet_utils.preprocess_input(images.astype(np.float32), mode=mode)
    np.testing.assert_allclose(ours(images), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('preprocessing', PREPROCESSINGS.values(), ids=lambda p: p.name)
def test_grey_is_repeated(preprocessing):
    grey = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 1), np.uint8)
    rgb = np.repeat(grey, 3, axis=-1)
    np.testing.assert_array_equal(preprocessing(grey), preprocessing(rgb))


@pytest.mark.parametrize('preprocessing', PREPROCESSINGS.values(), ids=lambda p: p.name)
def test_traced_and_eager_agree(preprocessing):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 3), np.uint8)
    traced = jax.jit(preprocessing)(images)
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, preprocessing(images), rtol=1e-6, atol=1e-6)
