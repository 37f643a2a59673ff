import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax.data.decode import image_shape, resize_image
from cnn_jax.data.source import from_arrays
from cnn_jax.data.sources import open_source
from cnn_jax.errors import UserError


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 3]),
    st.sampled_from(['stretch', 'crop']),
    st.integers(1, 20),
    st.sampled_from([0, 1, 3]),
)
def test_prepare_gives_the_promised_shape(height, width, channels, resize, size, wanted):
    image = np.zeros((height, width, channels), np.uint8)
    assert resize_image(image, resize, size, wanted).shape == (size, size, wanted or channels)
    assert resize_image(image, 'none', 0, wanted).shape == (height, width, wanted or channels)


@given(st.integers(1, 12), st.sampled_from(['stretch', 'crop']), st.integers(0, 255))
def test_a_flat_image_stays_flat(size, resize, value):
    image = np.full((7, 5, 3), value, np.uint8)
    assert (resize_image(image, resize, size) == value).all()


def test_the_right_size_is_left_alone(random_image):
    image = random_image((6, 6, 3))
    np.testing.assert_array_equal(resize_image(image, 'crop', 6), image)


def test_crop_takes_the_centre_square():
    image = np.zeros((4, 10, 1), np.uint8)
    image[:, 3:7] = 200
    assert (resize_image(image, 'crop', 4) == 200).all()
    assert (resize_image(image.transpose(1, 0, 2), 'crop', 4) == 200).all()


def test_crop_keeps_the_proportions_and_stretch_does_not():
    image = np.zeros((8, 16, 1), np.uint8)
    image[2:6, 6:10] = 255  # a square of half the height
    crop, stretch = (resize_image(image, resize, 8) > 127 for resize in ('crop', 'stretch'))
    assert (crop.any(axis=1).sum(), crop.any(axis=0).sum()) == (4, 4)
    assert (stretch.any(axis=1).sum(), stretch.any(axis=0).sum()) == (4, 2)


def test_reduction_does_not_alias():
    checkerboard = np.indices((64, 64)).sum(axis=0) % 2 * 255
    reduced = resize_image(checkerboard[..., None].astype(np.uint8), 'stretch', 8).astype(int)
    assert np.abs(reduced - 127).max() <= 8


@pytest.mark.parametrize('axis', [0, 1])
def test_bilinear_reduction_by_two_has_its_textbook_weights(axis):
    impulse = np.zeros((8, 8, 1), np.uint8)
    impulse[3] = 128  # the triangle of support 2 gives 3/8 and 1/8 to its neighbours
    reduced = resize_image(np.swapaxes(impulse, 0, axis), 'stretch', 4)
    assert np.swapaxes(reduced, 0, axis)[:, 0, 0].tolist() == [0, 48, 16, 0]


def test_images_of_different_sizes_are_named(tmp_path, write_images):
    write_images(tmp_path, {'cat': 3}, size=(8, 6))
    write_images(tmp_path, {'dog': 3}, size=(9, 7))
    source = open_source(f'folder:{tmp_path}', split='all')
    with pytest.raises(UserError) as caught:
        image_shape(source)
    message = str(caught.value)
    for part in ('cat/0.png is 6×8', 'dog/0.png is 7×9', 'config.data.resize', 'config.data.size'):
        assert part in message
    assert image_shape(source, 'stretch', 5) == (5, 5, 3)


@pytest.mark.parametrize('channels', [1, 3])
def test_channels_are_the_sources_unless_given(channels):
    images = np.zeros((2, 4, 5, channels), np.uint8)
    source = from_arrays('two', images, np.array([0, 1]), ('a', 'b'))
    assert image_shape(source) == (4, 5, channels)
    assert image_shape(source, channels=3) == (4, 5, 3)
    assert image_shape(source, channels=1) == (4, 5, 1)
