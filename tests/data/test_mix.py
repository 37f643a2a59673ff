"""Mixup and CutMix: label shares are pixel shares, partners a permutation, keys as everywhere."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cnn_jax.config import Augment
from cnn_jax.data import augment as mixing

KEY = jax.random.key(0)
B, H, W = 64, 9, 11
drawn = jax.jit(mixing.shares)


@functools.partial(jax.jit, static_argnames='kind')
def mixed(key, images, labels, index, kind, alpha=1.0):
    on = {
        'mixup': Augment(mixup=1),
        'cutmix': Augment(cutmix=1),
        'both': Augment(mixup=1, cutmix=1),
    }
    strengths = Augment(mixup=alpha, cutmix=alpha)
    return mixing.mix(on[kind], strengths, key, images, labels, index)


def batch(seed=0, size=B):
    """Images of one value each, which is the label: 1, 2, …"""
    labels = jnp.arange(1, size + 1, dtype=jnp.int32)
    images = jnp.broadcast_to(labels[:, None, None, None].astype(jnp.float32), (size, H, W, 3))
    return images, labels, jnp.arange(size, dtype=jnp.int32) + 1000 * seed


@pytest.mark.parametrize('kind', ['mixup', 'cutmix', 'both'])
def test_the_share_of_the_label_is_the_share_of_the_pixels(kind):
    images, labels, index = batch()
    result, other, share = mixed(KEY, images, labels, index, kind)
    of_labels = share * labels + (1 - share) * other
    np.testing.assert_allclose(np.asarray(result).mean((1, 2, 3)), of_labels, rtol=1e-5)


def test_cutmix_keeps_whole_pixels_and_counts_them_exactly():
    images, labels, index = batch()
    result, other, share = (np.asarray(x) for x in mixed(KEY, images, labels, index, 'cutmix'))
    own = (result == np.asarray(labels)[:, None, None, None]).all(-1)
    theirs = (result == other[:, None, None, None]).all(-1)
    assert (own | theirs).all()
    np.testing.assert_array_equal(share, own.sum((1, 2)).astype(np.float32) / (H * W))
    for cut in theirs:  # a rectangle: all of some rows by all of some columns
        rows, columns = cut.any(1), cut.any(0)
        np.testing.assert_array_equal(cut, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert np.abs(np.diff(np.pad(line, 1).astype(int))).sum() in (0, 2)


def test_mixup_is_the_weighted_mean():
    images = jax.random.normal(KEY, (B, H, W, 3))
    labels, index = jnp.arange(B, dtype=jnp.int32), jnp.arange(B, dtype=jnp.int32)
    result, other, share = mixed(KEY, images, labels, index, 'mixup')
    weight = np.asarray(share, np.float64)[:, None, None, None]
    wide = np.asarray(images, np.float64)
    np.testing.assert_allclose(result, weight * wide + (1 - weight) * wide[other], atol=1e-6)


@pytest.mark.parametrize('kind', ['mixup', 'cutmix', 'both'])
def test_strength_0_is_the_identity(kind):
    images = jax.random.normal(KEY, (B, H, W, 1))
    result, _, share = mixed(KEY, images, jnp.arange(B), jnp.arange(B), kind, 0.0)
    np.testing.assert_array_equal(result, images)
    np.testing.assert_array_equal(share, 1)


@pytest.mark.parametrize('size', [1, 2, 3, 64])
def test_partners_are_a_permutation_that_leaves_nobody_alone(size):
    keys = jax.random.split(KEY, size)
    partner = np.asarray(mixing.partners(keys))
    assert sorted(partner) == list(range(size))
    assert size == 1 or (partner != np.arange(size)).all()


def test_the_order_of_the_batch_does_not_matter():
    images, labels, index = batch()
    order = np.random.default_rng(0).permutation(B)
    whole = mixed(KEY, images, labels, index, 'cutmix')
    again = mixed(KEY, images[order], labels[order], index[order], 'cutmix')
    for a, b in zip(whole, again):
        np.testing.assert_array_equal(a[order], b)


def test_the_share_follows_from_step_and_index_not_from_the_batch():
    images, labels, index = batch()
    share = mixed(KEY, images, labels, index, 'mixup')[2]
    fewer = mixed(KEY, images[5:20], labels[5:20], index[5:20], 'mixup')[2]
    np.testing.assert_array_equal(share[5:20], fewer)
    next_step = mixed(jax.random.fold_in(KEY, 1), images, labels, index, 'mixup')[2]
    assert (np.asarray(next_step) != share).all()


@pytest.mark.parametrize('alpha', [0.1, 0.5, 1.0, 4.0])
def test_shares_have_the_beta_distribution(alpha):
    share = np.asarray(drawn(jax.random.split(KEY, 20_000), alpha))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 5 * np.sqrt(variance / len(share))
    assert share.var() == pytest.approx(variance, rel=0.05)
    low = share[share < 0.5]  # the other half is its mirror image, but float32 is coarse near 1
    assert stats.kstest(low, lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 1e-3
    assert abs(len(low) - 10_000) < 5 * np.sqrt(5000)


def test_with_both_on_a_coin_gives_each_half_of_the_examples():
    images, labels, index = batch(size=400)
    results = {k: mixed(KEY, images, labels, index, k) for k in ('mixup', 'cutmix', 'both')}
    by = {
        k: np.isclose(results['both'][0], results[k][0], rtol=1e-4).all((1, 2, 3))
        & np.isclose(results['both'][2], results[k][2], atol=1e-5)
        for k in ('mixup', 'cutmix')
    }
    assert (by['mixup'] | by['cutmix']).all()
    assert abs(by['mixup'].sum() - 200) < 50


def test_one_compilation_serves_all_strengths():
    images, labels, index = batch()
    mixed.clear_cache()
    for alpha in (0.0, 0.4, 2.0):
        mixed(KEY, images, labels, index, 'mixup', alpha)
    assert mixed._cache_size() == 1


ON_EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from cnn_jax.config import Augment
from cnn_jax.data.augment import shown
from cnn_jax.data.augment import mix

on = Augment(flip=True, crop=1, rotation=10.0, erasing=0.5, brightness=0.4, mixup=0.4, cutmix=1.0)

@jax.jit
def both(key, images, index):
    x = shown(on, on, key, images, index, lambda x: x.astype('float32') / 255)
    return mix(on, on, key, x, index, index)

images = np.random.default_rng(0).integers(0, 256, (16, 9, 9, 3), np.uint8)
index, key = np.arange(16, dtype=np.int32), jax.random.key(0)
mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
shared = jax.device_put((images, index), NamedSharding(mesh, PartitionSpec('data')))
one, eight = both(key, images, jax.numpy.asarray(index)), both(key, *shared)
assert len(eight[0].sharding.device_set) == 8
for a, b in zip(one, eight):
    np.testing.assert_array_equal(a, b)
"""


def test_one_and_eight_devices_show_the_same():
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
    command = [sys.executable, '-c', ON_EIGHT_DEVICES]
    done = subprocess.run(command, env=os.environ | {'XLA_FLAGS': flags}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
