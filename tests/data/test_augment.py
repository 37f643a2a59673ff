import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.config import Augment
from cnn_jax.data.augment import augment, shown

KEY = jax.random.key(0)
ALL = {'flip': True, 'crop': 2, 'cutout': 3}
few = settings(max_examples=20)


@functools.partial(jax.jit, static_argnames=('flip', 'crop', 'cutout'))
def changed(key, images, index, fill=0, flip=False, crop=0, cutout=0):
    return augment(key, images, index, flip=flip, crop=crop, cutout=cutout, fill=fill)


def repeated(image, count):
    """One image many times, and as many indices."""
    return jnp.broadcast_to(jnp.asarray(image), (count, *image.shape)), jnp.arange(count)


def distinct(height, width, channels=1):
    """An image whose pixels all differ, and from 0 too."""
    return np.arange(1, height * width * channels + 1, dtype=np.float32).reshape(
        height, width, channels
    )


@given(st.integers(0, 2**31), st.sampled_from([np.uint8, np.float32]))
@few
def test_off_is_the_identity(seed, dtype):
    images = np.random.default_rng(seed).integers(0, 256, (4, 5, 6, 3)).astype(dtype)
    result = changed(jax.random.key(seed), images, jnp.arange(4))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, images)


@given(st.integers(0, 2**31))
@few
def test_flipping_twice_is_the_identity(seed):
    images, index = repeated(distinct(3, 4), 8)
    key = jax.random.key(seed)
    once = changed(key, images, index, flip=True)
    np.testing.assert_array_equal(changed(key, once, index, flip=True), images)


def test_half_the_images_are_mirrored():
    image = distinct(3, 4)
    results = np.asarray(changed(KEY, *repeated(image, 1000), flip=True))
    mirrored = (results == image[:, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(results[~mirrored], repeated(image, (~mirrored).sum())[0])
    assert abs(mirrored.sum() - 500) < 4 * np.sqrt(250)


@pytest.mark.parametrize('fill', [0.0, -7.0])
def test_a_crop_is_a_window_of_the_padded_image(fill):
    image, pad = distinct(3, 4), 2
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    windows = {
        padded[top : top + 3, left : left + 4].tobytes(): 0
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }
    for result in np.asarray(changed(KEY, *repeated(image, 1000), fill=fill, crop=pad)):
        windows[result.tobytes()] += 1  # a KeyError where it is no window
    expected = 1000 / len(windows)
    assert all(abs(n - expected) < 5 * np.sqrt(expected) for n in windows.values())


@pytest.mark.parametrize('side', [2, 3])
def test_cutout_is_a_square_clipped_at_the_borders(side):
    image = distinct(4, 5)
    possible = set()
    for row in range(4):
        for column in range(5):
            cut = image.copy()
            top, left = row - side // 2, column - side // 2
            cut[max(0, top) : top + side, max(0, left) : left + side] = 0
            possible.add(cut.tobytes())
    results = np.asarray(changed(KEY, *repeated(image, 500), cutout=side))
    assert {result.tobytes() for result in results} == possible


def test_a_square_inside_has_its_whole_area():
    images, index = repeated(np.ones((50, 50, 1), np.float32), 200)
    areas = np.asarray((changed(KEY, images, index, cutout=6) == 0).sum(axis=(1, 2, 3)))
    assert areas.max() == 36
    assert areas.min() >= 9
    assert (areas == 36).mean() > 0.6


@given(st.lists(st.integers(0, 11), min_size=5, max_size=5), st.integers(0, 2**31))
@few
def test_the_batch_does_not_matter(chosen, seed):
    images = np.random.default_rng(seed).integers(0, 256, (12, 6, 5, 3), np.uint8)
    index, key = np.arange(100, 112), jax.random.key(seed)
    whole = changed(key, images, index, **ALL)
    part = changed(key, images[chosen], index[chosen], **ALL)
    np.testing.assert_array_equal(part, whole[np.array(chosen)])


def test_step_and_index_change_the_result():
    images, index = repeated(distinct(8, 8), 20)
    first = changed(jax.random.fold_in(KEY, 1), images, index, **ALL)
    second = changed(jax.random.fold_in(KEY, 2), images, index, **ALL)
    assert len({np.asarray(image).tobytes() for image in [*first, *second]}) > 30


def test_no_type_or_rank_is_promoted():
    images = jnp.zeros((2, 6, 6, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        jax.eval_shape(
            functools.partial(augment, **ALL, fill=np.zeros(3, np.float32)),
            KEY,
            images,
            jnp.arange(2),
        )


@pytest.mark.parametrize('dtype', [np.uint8, np.float32, jnp.bfloat16])
def test_fill_is_one_value_a_channel(dtype):
    images = jnp.zeros((200, 6, 6, 3), dtype)
    fill = jnp.array([10, 20, 30], dtype)
    result = changed(KEY, images, jnp.arange(200), fill=fill, **ALL)
    assert result.dtype == dtype
    colours = np.unique(np.asarray(result, np.float32).reshape(-1, 3), axis=0)
    assert colours.tolist() == [[0, 0, 0], [10, 20, 30]]


STRENGTHS = ('rotation', 'erasing', 'brightness', 'contrast', 'saturation', 'trivialaugment')
EVERYTHING = Augment(flip=True, crop=1, cutout=2, **dict.fromkeys(STRENGTHS, 1.0))
OFF = dict.fromkeys(STRENGTHS, 0.0)


@functools.partial(jax.jit, static_argnames='on')
def shown_by(key, images, index, numbers, on=STRENGTHS):
    switches = Augment(**{name: getattr(EVERYTHING, name) for name in on})
    return shown(switches, Augment(**numbers), key, images, index, prepared)


def prepared(images):
    return images.astype(jnp.float32) / 64 - 2


def photographs(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 7, 6, 3), np.uint8)


def test_all_strengths_at_0_show_what_is_prepared():
    images, index = photographs(8), np.arange(8)
    result = shown_by(KEY, images, index, OFF)
    np.testing.assert_array_equal(result, jax.jit(prepared)(images))


def test_one_compilation_serves_all_strengths():
    images, index = photographs(8), np.arange(8)
    shown_by(KEY, images, index, OFF)
    compiled = shown_by._cache_size()
    for strength in (0.2, 1.0):
        shown_by(KEY, images, index, dict.fromkeys(STRENGTHS, strength))
    assert shown_by._cache_size() == compiled


def test_what_is_shown_follows_from_step_and_index_alone():
    images, index = photographs(8), np.arange(100, 108)
    numbers = {'rotation': 15.0, 'erasing': 0.5, 'brightness': 0.4, 'trivialaugment': 1.0}
    arguments = numbers, (*STRENGTHS, 'flip', 'crop', 'cutout')
    whole = np.asarray(shown_by(KEY, images, index, *arguments))
    chosen = np.array([7, 2, 2, 5, 0, 0, 1, 6])
    part = shown_by(KEY, images[chosen], index[chosen], *arguments)
    np.testing.assert_array_equal(part, whole[chosen])
    other = shown_by(jax.random.fold_in(KEY, 1), images, index, *arguments)
    assert (np.asarray(other) != whole).any((1, 2, 3)).all()


def test_a_change_is_the_same_whether_others_are_on_or_off():
    images, index = photographs(8), np.arange(8)
    alone = shown_by(KEY, images, index, {'rotation': 15.0}, ('rotation',))
    beside = shown_by(KEY, images, index, OFF | {'rotation': 15.0})
    np.testing.assert_allclose(alone, beside, atol=1e-5)  # other code, other rounding


def test_angles_are_uniform_between_both_bounds():
    image = np.zeros((41, 41, 1), np.float32)
    image[20, 40] = 1  # on the right; a positive angle moves it up
    images, index = repeated(image, 400)
    turned = augment(KEY, images, index, rotation=40.0)
    rows = np.arange(41)[None, :, None, None]
    height = 20 - (np.asarray(turned) * rows).sum((1, 2, 3)) / np.asarray(turned).sum((1, 2, 3))
    angles = np.rad2deg(np.arcsin(np.clip(height / 20, -1, 1)))
    assert np.abs(angles).max() < 42
    assert abs(angles.mean()) < 5 * 80 / np.sqrt(12 * 400)
    assert angles.std() == pytest.approx(80 / np.sqrt(12), rel=0.1)
