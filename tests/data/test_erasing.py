"""Random erasing: rate, area and aspect lie where they are said to."""

import jax
import numpy as np
import pytest

from cnn_jax.data.augment import Erasing, erase

KEY = jax.random.key(0)


@jax.jit
def erased(keys, image, erasing):
    fill = np.zeros((1, 1, image.shape[-1]), np.float32)
    return jax.vmap(lambda key: erase(key, image, erasing, fill))(keys)


def holes(erasing, height=40, width=50, count=1000):
    """Which pixels each of many images loses."""
    image = np.ones((height, width, 2), np.float32)
    results = np.asarray(erased(jax.random.split(KEY, count), image, erasing))
    assert (results[..., 0] == results[..., 1]).all()
    return results[..., 0] == 0


def sides(hole):
    rows, columns = hole.any(1), hole.any(0)
    np.testing.assert_array_equal(hole, rows[:, None] & columns[None])
    return rows.sum(), columns.sum()


@pytest.mark.parametrize(('least', 'most'), [(0.02, 0.4), (0.2, 0.2), (0.5, 1.0)])
@pytest.mark.parametrize('shape', [(40, 50), (28, 28)])
def test_area_and_aspect_are_in_their_ranges(least, most, shape):
    for hole in holes(Erasing(1.0, least, most, 0.3), *shape):
        tall, wide = sides(hole)
        half = 0.5 * (tall + wide) + 0.25  # sides are rounded
        assert least * hole.size - half <= tall * wide <= most * hole.size + half
        assert (tall + 0.5) / max(wide - 0.5, 0.1) >= 0.3
        assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3


def test_areas_are_uniform_and_shapes_symmetric():
    found = [sides(hole) for hole in holes(Erasing(1.0, 0.1, 0.3, 0.3), 50, 50)]
    tall, wide = np.transpose(found)
    area = tall * wide / 2500
    assert abs(area.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * len(area))
    assert abs((tall > wide).mean() - (tall < wide).mean()) < 5 / np.sqrt(len(area))


def test_every_pixel_can_be_lost():
    assert holes(Erasing(1.0)).any(0).all()


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
def test_the_rate_is_the_share_of_erased_images(rate):
    share = holes(Erasing(rate)).any((1, 2)).mean()
    assert abs(share - rate) <= 5 * np.sqrt(rate * (1 - rate) / 1000)


def test_rate_0_changes_no_bit():
    image = np.random.default_rng(0).normal(size=(9, 8, 3)).astype(np.float32)
    result = erased(KEY[None], image, Erasing(0.0))
    np.testing.assert_array_equal(result[0], image)


def test_one_compilation_serves_all_strengths():
    image = np.ones((8, 8, 1), np.float32)
    erased.clear_cache()
    for erasing in (Erasing(0.0, 0.1, 0.2, 0.5), Erasing(1.0), Erasing(0.5, 0.3, 0.3, 1.0)):
        erased(KEY[None], image, erasing)
    assert erased._cache_size() == 1
