import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnn_jax.data import batches as module
from cnn_jax.data.augment import normalize
from cnn_jax.data.batches import Arrays, DeviceBatches, StreamBatches, load, order, statistics
from cnn_jax.data.sources import open_source


class Images:
    """The least that `statistics` reads."""

    def __init__(self, images):
        self.images, self.n, self.image_shape = images, len(images), images.shape[1:]

    def read(self, index):
        return self.images[index]


@given(
    hnp.arrays(
        np.uint8, st.tuples(*(st.integers(1, n) for n in (9, 4, 4)), st.sampled_from([1, 3]))
    )
)
def test_statistics_are_numpys(images):
    mean, std = statistics(Images(images))
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    expected = np.maximum(pixels.std(axis=(0, 1, 2)), 1 / 255)
    np.testing.assert_allclose(std, expected, rtol=1e-6)


def test_more_images_than_a_chunk(random_image):
    images = random_image((2 * module.CHUNK + 5, 2, 3, 3))
    mean, std = statistics(Images(images))
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-9)


def test_large_sets_are_sampled_by_a_fixed_order(random_image, monkeypatch):
    images = random_image((50, 2, 2, 1))
    monkeypatch.setattr(module, 'SAMPLE_BYTES', 20 * 4 + 3)
    mean, _ = statistics(Images(images))
    assert mean.item() == pytest.approx((images[order(50, 0, 0)[:20]] / 255).mean(), rel=1e-12)


def test_both_providers_have_the_same_statistics():
    source = open_source('digits', split='train')
    device, stream = DeviceBatches(load(source), batch=8), StreamBatches(source, batch=8)
    np.testing.assert_array_equal(statistics(device), statistics(stream))


def test_normalized_training_images_are_standard(random_image):
    images = random_image((20, 8, 8, 3))
    batches = DeviceBatches(Arrays(images, np.zeros(20, np.int32), ('a', 'b'), ''), batch=4)
    normal = np.asarray(normalize(jnp.asarray(images), *statistics(batches)))
    np.testing.assert_allclose(normal.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=(0, 1, 2)), 1, atol=1e-5)
