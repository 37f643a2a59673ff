"""Affine maps against NumPy's rotations and SciPy's sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from cnn_jax.data import policies as geometry

affine = jax.jit(geometry.affine)


def image(height=7, width=7, channels=2, dtype=np.float32):
    return np.random.default_rng(0).integers(1, 256, (height, width, channels)).astype(dtype)


@pytest.mark.parametrize('dtype', [np.float32, np.uint8])
@pytest.mark.parametrize('shape', [(7, 7, 1), (6, 9, 3)])
def test_the_identity_changes_no_bit(shape, dtype):
    x = image(*shape, dtype)
    for matrix in (geometry.rotation(0.0), geometry.shear(0.0, 0.0), geometry.shift(0.0, 0.0)):
        result = affine(x, matrix)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize('side', [6, 7])
@pytest.mark.parametrize('quarters', [-1, 1, 2, 3, 4])
def test_quarter_turns_are_rot90(side, quarters):
    x = image(side, side)
    np.testing.assert_allclose(
        affine(x, geometry.rotation(90.0 * quarters)), np.rot90(x, quarters), atol=1e-2
    )


@pytest.mark.parametrize('matrix', [geometry.rotation(23.0), geometry.shear(0.3, -0.2)])
@pytest.mark.parametrize('fill', [0.0, -40.0])
def test_between_pixels_it_samples_as_scipy(matrix, fill):
    x = image(8, 11, 1)
    m, middle = np.asarray(matrix, np.float64), np.array([3.5, 5.0])
    expected = ndimage.affine_transform(
        x[..., 0].astype(np.float64),
        m[:, :2],
        middle - m[:, :2] @ middle + m[:, 2],
        order=1,
        mode='grid-constant',
        cval=fill,
    )
    np.testing.assert_allclose(affine(x, matrix, fill)[..., 0], expected, atol=1e-2)


def test_a_shift_by_whole_pixels_moves_them_and_fills_the_rest():
    x = image(5, 6)
    expected = np.full_like(x, 9)
    expected[:3, 1:] = x[2:, :-1]
    np.testing.assert_array_equal(affine(x, geometry.shift(2.0, -1.0), 9.0), expected)


def test_a_shear_moves_each_row_by_its_distance_from_the_centre():
    x = image(5, 5, 1)
    expected = np.stack([np.roll(row, 2 - r, 0) for r, row in enumerate(x)])
    for r in range(5):
        move = 2 - r
        expected[r, : max(move, 0)] = 0
        expected[r, 5 + min(move, 0) :] = 0
    np.testing.assert_array_equal(affine(x, geometry.shear(0.0, 1.0)), expected)


def test_integers_are_rounded_and_kept_in_their_range():
    x = jnp.array([-3.0, 0.4, 0.6, 254.6, 300.0])
    assert geometry.as_type(x, jnp.uint8).tolist() == [0, 0, 1, 255, 255]
