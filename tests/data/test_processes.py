"""The contract of several processes, counted example by example for both providers.

Training reads the endless concatenation of the epochs' permutations. So a run of E epochs takes
⌊E·n/batch⌋ batches, and leaves out the E·n mod batch last examples of its last epoch's
permutation: no batch is partial, and a longer run takes those first. Evaluation takes each example
once; what fills the last batch up has mask False.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.config import Augment
from cnn_jax.data.augment import augment_and_normalize
from cnn_jax.data.batches import DeviceBatches, StreamBatches, load, order
from cnn_jax.data.source import Source, from_arrays

N, BATCH, EPOCHS, SEED = 47, 30, 3, 5
COUNTS = [1, 2, 3, 5]
PROVIDERS = ['in memory', 'streaming']


def source(n=N) -> Source:
    """Images whose first pixel is their position."""
    images = np.random.default_rng(0).integers(0, 256, (n, 6, 4, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return from_arrays('made up', images, np.arange(n) % 3, tuple('abc'))


def opened(provider, count, batch=BATCH, seed=SEED):
    """What each of `count` processes opens."""
    shares = [{'process_index': p, 'process_count': count} for p in range(count)]
    if provider == 'streaming':
        return [StreamBatches(source(), batch=batch, seed=seed, **share) for share in shares]
    return [DeviceBatches(load(source()), batch=batch, seed=seed, **share) for share in shares]


def taken(batches, steps):
    """The first batches, as NumPy arrays; the iterator is closed."""
    found = [jax.device_get(batch) for batch in itertools.islice(batches, steps)]
    batches.close()
    return found


def joined(processes, steps, start=0):
    """The global batches: those of all processes, one after the other."""
    parts = zip(*(taken(each.train(start), steps) for each in processes), strict=True)
    return [jax.tree.map(lambda *xs: np.concatenate(xs), *batch) for batch in parts]


@pytest.mark.parametrize('provider', PROVIDERS)
@pytest.mark.parametrize('count', COUNTS)
def test_three_epochs_take_each_example_three_times(provider, count):
    steps = EPOCHS * N // BATCH
    each = [taken(process.train(), steps) for process in opened(provider, count)]
    seen = np.zeros(N, int)
    for batch in itertools.chain(*each):
        assert len(batch['index']) == BATCH // count
        assert batch['mask'].all()
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['index'])
        np.testing.assert_array_equal(batch['label'], batch['index'] % 3)
        np.add.at(seen, batch['index'], 1)
    left_out = order(N, SEED, EPOCHS - 1)[steps * BATCH - EPOCHS * N :]
    assert len(left_out) == EPOCHS * N % BATCH == 21
    expected = np.full(N, EPOCHS)
    expected[left_out] -= 1
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize('provider', PROVIDERS)
@pytest.mark.parametrize('count', COUNTS)
def test_no_two_processes_take_the_same_example_of_an_epoch(provider, count):
    steps = -(-EPOCHS * N // BATCH)
    each = [
        np.stack([batch['index'] for batch in taken(process.train(), steps)])
        for process in opened(provider, count)
    ]
    places = np.arange(steps * BATCH).reshape(steps, count, BATCH // count)
    for epoch in range(EPOCHS):
        mine = [set(part[places[:, p] // N == epoch]) for p, part in enumerate(each)]
        assert sum(map(len, mine)) == len(set().union(*mine)) == N


@pytest.mark.parametrize('provider', PROVIDERS)
@pytest.mark.parametrize('count', COUNTS)
def test_evaluation_counts_each_example_once(provider, count):
    seen, padding = np.zeros(N, int), 0
    for process in opened(provider, count):
        batches = [jax.device_get(batch) for batch in process.evaluate()]
        assert [len(batch['mask']) for batch in batches] == [BATCH // count] * 2
        for batch in batches:
            index = batch['index'][batch['mask']]
            np.testing.assert_array_equal(batch['image'][batch['mask']][:, 0, 0, 0], index)
            np.add.at(seen, index, 1)
            padding += (~batch['mask']).sum()
    assert (seen == 1).all()
    assert padding == 2 * BATCH - N


@settings(max_examples=12, derandomize=True)
@given(
    provider=st.sampled_from(PROVIDERS),
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 10**6),
    before=st.sampled_from(COUNTS),
    after=st.sampled_from(COUNTS),
)
def test_any_number_of_processes_goes_on_with_the_same_batches(provider, seed, step, before, after):
    run = joined(opened(provider, before, seed=seed), 3, start=step)
    resumed = joined(opened(provider, after, seed=seed), 2, start=step + 1)
    jax.tree.map(np.testing.assert_array_equal, run[1:], resumed)


@jax.jit
def augmented(images, index):
    changes = Augment(flip=True, crop=1, cutout=2)
    key = jax.random.key(9)
    return augment_and_normalize(changes, key, images, index, lambda x: x / jnp.float32(255))


@pytest.mark.parametrize('provider', PROVIDERS)
def test_an_augmented_image_is_the_same_in_any_number_of_processes(provider):
    found = []
    for count in COUNTS:
        images = {}
        for process in opened(provider, count):
            (batch,) = taken(process.train(), 1)
            changed = np.asarray(augmented(batch['image'], batch['index']))
            images |= dict(zip(batch['index'].tolist(), changed))
            assert not np.array_equal(changed, batch['image'] / np.float32(255))
        found.append(images)
    for images in found[1:]:
        assert images.keys() == found[0].keys()
        for index, image in images.items():
            assert image.tobytes() == found[0][index].tobytes()
