"""Changes of images: laws of each, keys that follow from step and index, off means not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cnn_jax.config import Augment
from cnn_jax.data import augment as module
from cnn_jax.data.augment import augment_and_normalize, augment_plane, erase
from tests.environments import on_devices

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=('flip', 'crop', 'cutout'))
def changed(key, images, index, **changes):
    return augment_plane(Augment(**changes), key, images, index)


def repeated(image, count):
    """One image many times, and as many indices."""
    return jnp.broadcast_to(jnp.asarray(image), (count, *image.shape)), jnp.arange(count)


def distinct(height, width):
    """An image whose pixels all differ, and from 0 too."""
    return np.arange(1, height * width + 1, dtype=np.float32).reshape(height, width, 1)


# Flip, crop, cutout, rotation.


def test_half_the_images_are_mirrored():
    image = distinct(3, 4)
    results = np.asarray(changed(KEY, *repeated(image, 1000), flip=True))
    mirrored = (results == image[:, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(results[~mirrored], repeated(image, (~mirrored).sum())[0])
    assert abs(mirrored.sum() - 500) < 4 * np.sqrt(250)


def test_a_crop_is_a_window_of_the_padded_image():
    image, pad = distinct(3, 4), 2
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    windows = {
        padded[top : top + 3, left : left + 4].tobytes(): 0
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }
    for result in np.asarray(changed(KEY, *repeated(image, 1000), crop=pad)):
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


def test_angles_are_uniform_between_both_bounds():
    image = np.zeros((41, 41, 1), np.float32)
    image[20, 40] = 1  # on the right; a positive angle moves it up
    turned = np.asarray(changed(KEY, *repeated(image, 400), rotation=40.0))
    rows = np.arange(41)[None, :, None, None]
    height = 20 - (turned * rows).sum((1, 2, 3)) / turned.sum((1, 2, 3))
    angles = np.rad2deg(np.arcsin(np.clip(height / 20, -1, 1)))
    assert np.abs(angles).max() < 42
    assert abs(angles.mean()) < 5 * 80 / np.sqrt(12 * 400)
    assert angles.std() == pytest.approx(80 / np.sqrt(12), rel=0.1)


# Everything together.

STRENGTHS = ('rotation', 'erasing', 'brightness', 'contrast', 'saturation', 'trivialaugment')
OFF = dict.fromkeys(STRENGTHS, 0.0)
STATIC = {'flip': True, 'crop': 1, 'cutout': 2}


@functools.partial(jax.jit, static_argnames='static')
def network_input(key, images, index, strengths, static=()):
    augment = Augment(**strengths, **{name: STATIC[name] for name in static})
    return augment_and_normalize(augment, key, images, index, scaled)


def scaled(images):
    return images.astype(jnp.float32) / 64 - 2


def photographs(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 7, 6, 3), np.uint8)


def test_one_compilation_serves_all_strengths_and_0_changes_no_bit():
    images, index = photographs(8), np.arange(8)
    network_input.clear_cache()
    np.testing.assert_array_equal(network_input(KEY, images, index, OFF), jax.jit(scaled)(images))
    for strength in (0.2, 1.0):
        network_input(KEY, images, index, dict.fromkeys(STRENGTHS, strength))
    assert network_input._cache_size() == 1


def test_what_is_off_is_not_compiled():
    def text(**changes):
        def apply(key, images, index):
            return augment_and_normalize(Augment(**changes), key, images, index, scaled)

        return jax.jit(apply).lower(KEY, photographs(2), np.arange(2)).as_text()

    assert text() == text(**OFF)
    for name in STRENGTHS:
        assert len(text()) < len(text(**{name: 0.5}))


def test_the_result_follows_from_step_and_index_alone():
    images, index = photographs(8), np.arange(100, 108)
    numbers = {'rotation': 15.0, 'erasing': 0.5, 'brightness': 0.4, 'trivialaugment': 1.0}
    arguments = numbers, tuple(STATIC)
    whole = np.asarray(network_input(KEY, images, index, *arguments))
    chosen = np.array([7, 2, 2, 5, 0, 0, 1, 6])
    part = network_input(KEY, images[chosen], index[chosen], *arguments)
    np.testing.assert_array_equal(part, whole[chosen])
    other = network_input(jax.random.fold_in(KEY, 1), images, index, *arguments)
    assert (np.asarray(other) != whole).any((1, 2, 3)).all()


def test_a_change_is_the_same_whether_others_are_on_or_off():
    images, index = photographs(8), np.arange(8)
    alone = network_input(KEY, images, index, {'rotation': 15.0})
    beside = network_input(KEY, images, index, OFF | {'rotation': 15.0})
    np.testing.assert_allclose(alone, beside, atol=1e-5)  # other code, other rounding


# Random erasing.


@jax.jit
def erased(keys, image, settings):
    return jax.vmap(lambda key: erase(Augment(**settings), key, image))(keys)


def holes(rate=1.0, least=0.02, most=0.4, height=40, width=50, count=1000):
    """The mask of the pixels that each of many images loses."""
    settings = {'erasing': rate, 'erase_least': least, 'erase_most': most}
    image = np.ones((height, width, 2), np.float32)
    results = np.asarray(erased(jax.random.split(KEY, count), image, settings))
    assert (results[..., 0] == results[..., 1]).all()
    return results[..., 0] == 0


def sides(hole):
    """Height and width of a rectangle: all of some rows by all of some columns."""
    rows, columns = hole.any(1), hole.any(0)
    np.testing.assert_array_equal(hole, rows[:, None] & columns[None])
    return rows.sum(), columns.sum()


@pytest.mark.parametrize(('least', 'most'), [(0.02, 0.4), (0.2, 0.2), (0.5, 1.0)])
@pytest.mark.parametrize('shape', [(40, 50), (28, 28)])
def test_area_and_aspect_of_erasing_are_in_their_ranges(least, most, shape):
    for hole in holes(1.0, least, most, *shape):
        tall, wide = sides(hole)
        half = 0.5 * (tall + wide) + 0.25  # sides are rounded
        assert least * hole.size - half <= tall * wide <= most * hole.size + half
        assert (tall + 0.5) / max(wide - 0.5, 0.1) >= 0.3
        assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3


def test_erased_areas_are_uniform_shapes_symmetric_and_places_everywhere():
    masks = holes(1.0, 0.1, 0.3, 50, 50)
    tall, wide = np.transpose([sides(hole) for hole in masks])
    area = tall * wide / 2500
    assert abs(area.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * len(area))
    assert abs((tall > wide).mean() - (tall < wide).mean()) < 5 / np.sqrt(len(area))
    assert masks.any(0).all()


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
def test_the_rate_is_the_fraction_of_erased_images(rate):
    fraction = holes(rate).any((1, 2)).mean()
    assert abs(fraction - rate) <= 5 * np.sqrt(rate * (1 - rate) / 1000)


# Mixup and CutMix: label fractions are pixel fractions, partners a permutation.

B, H, W = 64, 9, 11
drawn = jax.jit(module.sample_lambda)
KINDS = {'mixup': ('mixup',), 'cutmix': ('cutmix',), 'both': ('mixup', 'cutmix')}


@functools.partial(jax.jit, static_argnames='kind')
def mixed(key, images, labels, index, kind, alpha=1.0):
    return module.mix(Augment(**dict.fromkeys(KINDS[kind], alpha)), key, images, labels, index)


def batch(size=B):
    """Images of one value each, which is the label: 1, 2, …"""
    labels = jnp.arange(1, size + 1, dtype=jnp.int32)
    images = jnp.broadcast_to(labels[:, None, None, None].astype(jnp.float32), (size, H, W, 3))
    return images, labels, jnp.arange(size, dtype=jnp.int32)


@pytest.mark.parametrize('kind', KINDS)
def test_lambda_is_the_fraction_of_the_pixels(kind):
    images, labels, index = batch()
    result, other, lam = mixed(KEY, images, labels, index, kind)
    expected = lam * labels + (1 - lam) * other
    np.testing.assert_allclose(np.asarray(result).mean((1, 2, 3)), expected, rtol=1e-5)


def test_cutmix_keeps_whole_pixels_and_counts_them_exactly():
    images, labels, index = batch()
    result, other, lam = (np.asarray(x) for x in mixed(KEY, images, labels, index, 'cutmix'))
    own = (result == np.asarray(labels)[:, None, None, None]).all(-1)
    theirs = (result == other[:, None, None, None]).all(-1)
    assert (own | theirs).all()
    np.testing.assert_array_equal(lam, own.sum((1, 2)).astype(np.float32) / (H * W))
    for cut in theirs:
        sides(cut)
        for line in (cut.any(1), cut.any(0)):  # without a gap
            assert np.abs(np.diff(np.pad(line, 1).astype(int))).sum() in (0, 2)


@pytest.mark.parametrize('kind', KINDS)
def test_one_compilation_serves_all_alphas_and_0_changes_no_bit(kind):
    images, index = jax.random.normal(KEY, (B, H, W, 1)), jnp.arange(B)
    mixed.clear_cache()
    result, _, lam = mixed(KEY, images, index, index, kind, 0.0)
    np.testing.assert_array_equal(result, images)
    np.testing.assert_array_equal(lam, 1)
    mixed(KEY, images, index, index, kind, 2.0)
    assert mixed._cache_size() == 1


@pytest.mark.parametrize('size', [1, 2, 3, 64])
def test_partners_are_a_permutation_that_leaves_nobody_alone(size):
    partner = np.asarray(module.partners(jax.random.split(KEY, size)))
    assert sorted(partner) == list(range(size))
    assert size == 1 or (partner != np.arange(size)).all()


def test_the_order_of_the_batch_does_not_matter_to_mixing():
    images, labels, index = batch()
    order = np.random.default_rng(0).permutation(B)
    whole = mixed(KEY, images, labels, index, 'cutmix')
    again = mixed(KEY, images[order], labels[order], index[order], 'cutmix')
    for a, b in zip(whole, again):
        np.testing.assert_array_equal(a[order], b)


@pytest.mark.parametrize('alpha', [0.1, 0.5, 1.0, 4.0])
def test_lambda_has_the_beta_distribution(alpha):
    lam = np.asarray(drawn(jax.random.split(KEY, 20_000), alpha))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 5 * np.sqrt(variance / len(lam))
    assert lam.var() == pytest.approx(variance, rel=0.05)
    low = lam[lam < 0.5]  # the other half is its mirror image, but float32 is coarse near 1
    assert stats.kstest(low, lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 1e-3
    assert abs(len(low) - 10_000) < 5 * np.sqrt(5000)


def test_with_both_on_a_coin_gives_each_half_of_the_examples():
    images, labels, index = batch(400)
    results = {k: mixed(KEY, images, labels, index, k) for k in KINDS}
    by = {
        k: np.isclose(results['both'][0], results[k][0], rtol=1e-4).all((1, 2, 3))
        & np.isclose(results['both'][2], results[k][2], atol=1e-5)
        for k in ('mixup', 'cutmix')
    }
    assert (by['mixup'] | by['cutmix']).all()
    assert abs(by['mixup'].sum() - 200) < 50


ON_EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from cnn_jax.config import Augment
from cnn_jax.data.augment import augment_and_normalize, mix

on = Augment(flip=True, crop=1, rotation=10.0, erasing=0.5, brightness=0.4, mixup=0.4, cutmix=1.0)

@jax.jit
def both(key, images, index):
    x = augment_and_normalize(on, key, images, index, lambda x: x.astype('float32') / 255)
    return mix(on, key, x, index, index)

images = np.random.default_rng(0).integers(0, 256, (16, 9, 9, 3), np.uint8)
index, key = np.arange(16, dtype=np.int32), jax.random.key(0)
mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
shared = jax.device_put((images, index), NamedSharding(mesh, PartitionSpec('data')))
one, eight = both(key, images, jax.numpy.asarray(index)), both(key, *shared)
assert len(eight[0].sharding.device_set) == 8
for a, b in zip(one, eight):
    np.testing.assert_array_equal(a, b)
"""


def test_one_and_eight_devices_compute_the_same():
    on_devices(8, ON_EIGHT_DEVICES)


# Normalization.


def test_normalization_is_its_equation():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = (images / 255 - 0.1307) / 0.3081
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        normal = module.normalize(jnp.asarray(images), [0.1307], [0.3081])
        rounded = module.normalize(jnp.asarray(images), [0.1307], [0.3081], jnp.bfloat16)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(normal, expected, rtol=0, atol=1e-6)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, normal.astype(jnp.bfloat16))
