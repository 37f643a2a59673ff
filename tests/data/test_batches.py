"""Order, decoded sets, statistics, and both providers: the same batches whoever makes them.

Training reads the endless concatenation of the epochs' permutations. So a run of E epochs takes
⌊E·n/batch⌋ batches, and leaves out the E·n mod batch last examples of its last epoch's
permutation: no batch is partial, and a longer run takes those first. Evaluation takes each example
once; what fills the last batch up has mask False.
"""

import itertools
import json
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from cnn_jax import config
from cnn_jax.data import batches as module
from cnn_jax.data.batches import (
    PART,
    DeviceBatches,
    StreamBatches,
    balanced_indices,
    eval_batches,
    load,
    open_batches,
    order,
    statistics,
    train_indices,
    with_order,
)
from cnn_jax.data.decode import resize_image
from cnn_jax.data.source import Source, from_arrays
from cnn_jax.errors import UserError
from cnn_jax.runtime import cores
from tests.data.conftest import open_source
from tests.environments import on_devices

PROVIDERS = {'never': DeviceBatches, 'always': StreamBatches}
sizes = st.integers(1, 60)
seeds = st.integers(0, 2**32 - 1)
process_counts = st.sampled_from([1, 2, 3, 5])


def first(batches, count):
    """The first batches, as NumPy arrays; the iterator is closed."""
    arrays = [jax.device_get(batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return arrays


def assert_same(a, b):
    assert len(a) == len(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The order.


@given(sizes, seeds, st.integers(0, 1000))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    permutation = order(n, seed, epoch)
    assert permutation.dtype == np.int32
    assert sorted(permutation.tolist()) == list(range(n))


def test_the_order_is_the_same_for_ever():
    assert order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    assert len({tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25


@given(sizes, st.integers(1, 70), seeds, process_counts)
def test_training_is_the_epochs_one_after_the_other(n, batch, seed, process_count):
    batch *= process_count
    steps = -(-3 * n // batch)
    parts = [
        train_indices(n, batch, seed, step, (process, process_count))
        for step in range(steps)
        for process in range(process_count)
    ]
    stream = np.concatenate(parts)
    epochs = [order(n, seed, epoch) for epoch in range(-(-len(stream) // n))]
    np.testing.assert_array_equal(stream, np.concatenate(epochs)[: len(stream)])


@given(sizes, st.integers(1, 70), process_counts)
def test_evaluation_takes_every_example_once_and_pads_the_last_batch(n, batch, process_count):
    batch *= process_count
    seen = []
    each = [
        list(eval_batches(n, batch, (process, process_count))) for process in range(process_count)
    ]
    for number, processes in enumerate(zip(*each)):
        index, mask = (np.concatenate(parts) for parts in zip(*processes))
        assert (index.shape, index.dtype, mask.dtype) == ((batch,), np.int32, bool)
        assert (index[~mask] == 0).all()
        assert mask.all() or number == len(each[0]) - 1
        seen += index[mask].tolist()
    assert seen == list(range(n))


@given(
    st.lists(sizes, min_size=1, max_size=6), st.integers(1, 20), seeds, process_counts,
    st.integers(0, 200),
)  # fmt: skip
def test_classes_and_their_examples_are_drawn_equally_often(counts, batch, seed, parts, first):
    ends = np.cumsum(counts)
    by_class = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(counts, ends)]
    batch *= parts
    stream = np.concatenate(
        [
            balanced_indices(by_class, batch, seed, step, (process, parts))
            for step in range(first + 3)
            for process in range(parts)
        ]
    )
    assert stream.dtype == np.int32
    whole = balanced_indices(by_class, batch, seed, first)  # a run that resumes there
    np.testing.assert_array_equal(stream[first * batch :][:batch], whole)
    for end in (len(stream), len(stream) // 2, len(counts)):
        seen = np.bincount(stream[:end], minlength=ends[-1])
        of_classes = [seen[rows].sum() for rows in by_class]
        assert max(of_classes) - min(of_classes) <= 1
        assert all(np.ptp(seen[rows]) <= 1 for rows in by_class)


def test_the_balanced_order_is_the_same_for_ever_and_another_for_each_seed():
    by_class = [np.arange(3, dtype=np.int32), np.arange(3, 10, dtype=np.int32)]
    assert balanced_indices(by_class, 8, 0, 0).tolist() == [0, 4, 7, 2, 5, 1, 0, 6]
    orders = {tuple(balanced_indices(by_class, 8, s, step)) for s in range(9) for step in range(9)}
    assert len(orders) == 81


def test_a_batch_that_processes_cannot_share():
    with pytest.raises(UserError, match='3 processes'):
        open_batches(config.Data(source='digits'), 'train', process=(0, 3))


# Decoded sets.


@pytest.fixture
def folder(tmp_path, write_images) -> config.Data:
    write_images(tmp_path, {'a': 9, 'b': 8}, size=(8, 12))
    return config.Data(source=f'folder:{tmp_path}', resize='crop', size=5, batch=4)


def test_files_are_decoded_once_by_each_rule(folder, monkeypatch, cache_dir):
    source = open_source(folder.source, split='all')
    first = load(source, 'crop', 5)
    (path,) = cache_dir.glob('images/*.npy')
    written = path.stat().st_mtime_ns
    np.testing.assert_array_equal(load(source, 'crop', 5), first)
    assert path.stat().st_mtime_ns == written
    for other in (('stretch', 5), ('crop', 6), ('crop', 5, 1)):
        load(source, *other)
    monkeypatch.setattr(module, 'RULE', module.RULE + 1)
    load(source, 'crop', 5)
    monkeypatch.setattr('PIL.__version__', 'another')
    load(source, 'crop', 5)
    assert len(list(cache_dir.glob('images/*.npy'))) == 6


# Statistics.


class Images:
    """The least that `statistics` reads."""

    def __init__(self, images):
        self.images, self.n, self.image_shape = images, len(images), images.shape[1:]

    def read(self, index):
        return self.images[index]


shapes = st.tuples(*(st.integers(1, n) for n in (9, 4, 4)), st.sampled_from([1, 3]))


@given(hnp.arrays(np.uint8, shapes))
def test_statistics_are_numpys(images):
    mean, std = statistics(Images(images))
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    expected = np.maximum(pixels.std(axis=(0, 1, 2)), 1 / 255)
    np.testing.assert_allclose(std, expected, rtol=1e-6)


def test_large_sets_are_sampled_by_a_fixed_order(random_image, monkeypatch):
    images = random_image((50, 2, 2, 1))
    monkeypatch.setattr(module, 'SAMPLE_BYTES', 20 * 4 + 3)
    monkeypatch.setattr(module, 'SAMPLE_CHUNK', 7)
    mean, _ = statistics(Images(images))
    assert mean.item() == pytest.approx((images[order(50, 0, 0)[:20]] / 255).mean(), rel=1e-12)


# Providers.


def both(data: config.Data, which: str):
    """The same data, on the device and streamed."""
    whole = config.Config(data=data)
    kinds = (config.replace(whole, {'data.stream': kind}).data for kind in PROVIDERS)
    return [open_batches(kind, which) for kind in kinds]


@pytest.fixture(params=['digits', 'folder'])
def data(request, folder) -> config.Data:
    return {'folder': folder, 'digits': config.Data(source='digits', batch=32)}[request.param]


@pytest.mark.parametrize('stream', PROVIDERS)
def test_batches_are_the_sources_examples_in_order(folder, stream):
    folder.stream = stream
    source = open_source(folder.source, split='train')
    for step, batch in enumerate(first(open_batches(folder, 'train', seed=3).train(), 5)):
        index = train_indices(len(source), 4, 3, step)
        np.testing.assert_array_equal(batch['index'], index)
        np.testing.assert_array_equal(batch['label'], source.labels[index])
        images = [resize_image(source[i][0], 'crop', 5) for i in index]
        np.testing.assert_array_equal(batch['image'], images)
        assert batch['mask'].all()
    assert {key: v.dtype for key, v in batch.items()} == {
        **{'image': np.uint8, 'label': np.int32},
        **{'index': np.int32, 'mask': bool},
    }


def test_both_providers_give_the_same_batches(data):
    device, stream = both(data, 'train')
    for start in (0, 1, device.n // data.batch - 1, 1000):
        assert_same(first(device.train(start), 4), first(stream.train(start), 4))
    index = np.array([3, 0, 3])
    np.testing.assert_array_equal(device.read(index), stream.read(index))
    np.testing.assert_array_equal(statistics(device), statistics(stream))
    for name in ('n', 'class_names', 'image_shape', 'fingerprint', 'skipped'):
        assert getattr(device, name) == getattr(stream, name)
    np.testing.assert_array_equal(device.labels, stream.labels)


@pytest.mark.parametrize('stream', PROVIDERS)
def test_evaluation_takes_every_example_once(data, stream):
    data.stream = stream
    batches = open_batches(data, 'eval')
    found = list(map(jax.device_get, batches.evaluate()))
    for batch, (index, mask) in zip(found, eval_batches(batches.n, data.batch), strict=True):
        np.testing.assert_array_equal(batch['index'], index)
        np.testing.assert_array_equal(batch['mask'], mask)
        np.testing.assert_array_equal(batch['image'], batches.read(index))
        np.testing.assert_array_equal(batch['label'], batches.labels[index])


@pytest.mark.parametrize('stream', PROVIDERS)
def test_another_order_is_that_of_another_provider(data, stream):
    data.stream = stream
    other = with_order(open_batches(data, 'train', seed=1), batch=5, seed=2, balance=True)
    data.batch, data.balance = 5, True
    assert_same(first(other.train(3), 2), first(open_batches(data, 'train', seed=2).train(3), 2))


def test_the_decoded_size_decides(folder):
    folder.memory_gb = 13 * 5 * 5 * 3 / 1e9  # the 13 training images, to the byte
    assert type(open_batches(folder, 'train')) is DeviceBatches
    folder.memory_gb -= 1e-9
    assert type(open_batches(folder, 'train')) is StreamBatches
    for kind, provider in PROVIDERS.items():
        folder.stream = kind
        assert type(open_batches(folder, 'train')) is provider


def test_a_training_batch_larger_than_the_data(folder):
    folder.batch = 14
    with pytest.raises(UserError, match=r'config.data.batch is 14, but folder:.* 13 examples'):
        open_batches(folder, 'train')
    (batch,) = open_batches(folder, 'eval').evaluate()  # here the rest is padding
    assert batch['mask'].sum() == 4


def test_images_that_no_machine_holds(folder):
    folder.size = 10**7
    with pytest.raises(UserError, match='4 images of 10000000×10000000×3 take'):
        open_batches(folder, 'train')


@pytest.mark.parametrize('stream', PROVIDERS)
def test_a_source_of_ones_own(stream, random_image):
    images, labels = random_image((20, 5, 4, 3)), np.arange(20) % 4
    data = config.Data(stream=stream, batch=6)
    for which in ('train', 'eval'):
        batches = open_batches(data, which, source=(images, labels))
        (batch,) = first(batches.train() if which == 'train' else batches.evaluate(), 1)
        np.testing.assert_array_equal(batch['image'], images[batch['index']])
        np.testing.assert_array_equal(batch['label'], labels[batch['index']])
    images[3, 0, 0, 0] ^= 1
    assert open_batches(data, 'eval', source=(images, labels)).fingerprint != batches.fingerprint


def test_both_providers_skip_the_same_images(folder, tmp_path):
    whole = (tmp_path / 'b/1.png').read_bytes()
    (tmp_path / 'b/1.png').write_bytes(whole[:-30])
    (tmp_path / 'a/3.png').write_bytes(b'')
    with pytest.raises(UserError, match=r'2 of the 17 images .*max_corrupt'):
        open_batches(folder, 'train')
    folder.max_corrupt = 2 / 17
    device, stream = both(folder, 'eval')
    assert [path for path, _ in device.skipped] == ['a/3.png', 'b/1.png']
    assert (device.skipped, device.fingerprint) == (stream.skipped, stream.fingerprint)
    assert_same(list(device.evaluate()), list(stream.evaluate()))


def test_an_error_while_streaming_reaches_the_consumer(folder, tmp_path):
    folder.stream = 'always'
    batches = open_batches(folder, 'train')
    (tmp_path / 'a/0.png').unlink()
    with pytest.raises(UserError, match=r'a/0\.png has changed'):
        first(batches.train(), 4)


def test_a_stream_that_is_left_ends_its_threads(folder):
    folder.stream = 'always'

    def readers():
        return {t for t in threading.enumerate() if t.name.startswith('grain')}

    others = readers()  # of streams that end meanwhile
    stream = open_batches(folder, 'train').train()
    next(stream)
    assert readers() - others
    stream.close()
    deadline = time.monotonic() + 10
    while readers() - others and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers() - others


# Several processes and devices.

N, BATCH, SEED = 47, 30, 5
COUNTS = [1, 2, 3, 5]


def numbered() -> Source:
    """Images whose first pixel is their position."""
    images = np.random.default_rng(0).integers(0, 256, (N, 6, 4, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(N)
    return from_arrays('numbered', images, np.arange(N) % 3, tuple('abc'))


def processes(stream, count, seed=SEED):
    """The batches that each of `count` processes opens."""
    parts = [(number, count) for number in range(count)]
    return [PROVIDERS[stream](numbered(), batch=BATCH, seed=seed, process=each) for each in parts]


def joined(each):
    """The global batches: those of all processes, one after the other."""
    return [jax.tree.map(lambda *xs: np.concatenate(xs), *b) for b in zip(*each, strict=True)]


@settings(max_examples=12, derandomize=True)
@given(
    stream=st.sampled_from(list(PROVIDERS)),
    seed=seeds,
    step=st.integers(0, 10**6),
    before=st.sampled_from(COUNTS),
    after=st.sampled_from(COUNTS),
)
def test_any_number_of_processes_resumes_with_the_same_batches(stream, seed, step, before, after):
    run = joined([first(p.train(step), 3) for p in processes(stream, before, seed)])
    resumed = joined([first(p.train(step + 1), 2) for p in processes(stream, after, seed)])
    assert_same(run[1:], resumed)
    assert_same(*(joined([[*p.evaluate()] for p in processes(stream, n)]) for n in (before, after)))


SHARDED = """
import itertools
import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnn_jax import config
from cnn_jax.data.batches import open_batches

mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType[sys.argv[1]],))
sharding = NamedSharding(mesh, PartitionSpec('data'))
same = []
for stream in ('never', 'always'):
    data = config.Data(source='digits', stream=stream, batch=8)
    for which in ('train', 'eval'):
        plain, spread = (
            open_batches(data, which, sharding=layout) for layout in (None, sharding)
        )
        batches = zip(*(b.train(3) if which == 'train' else b.evaluate() for b in (plain, spread)))
        for a, b in itertools.islice(batches, 3):
            same += [np.array_equal(a[key], b[key]) for key in a]
            same += [b[key].sharding.is_equivalent_to(sharding, b[key].ndim) for key in b]
print(json.dumps(same))
"""


@pytest.mark.parametrize('axis_type', ['Auto', 'Explicit'])
def test_a_sharded_batch_is_the_same_batch(axis_type):
    same = json.loads(on_devices(4, SHARDED, axis_type))
    assert len(same) == 2 * 2 * 3 * 8
    assert all(same)


# The memory of streaming.


def computed(n, read=lambda i: np.full((2, 2, 1), i % 251, np.uint8)) -> Source:
    """A source whose images are computed when they are read: none is kept."""
    return Source(
        name='computed',
        class_names=('a', 'b'),
        labels=np.broadcast_to(np.int32(1), (n,)),
        sizes=np.broadcast_to(np.int32(2), (n, 2)),
        channels=1,
        read=read,
        describe=str,
        fingerprint='computed',
    )


@pytest.mark.parametrize('batch', [8, 3 * PART + 1], ids=['one part', 'several parts'])
@pytest.mark.parametrize('n', [1_000, 1_000_000])
def test_the_images_at_once_do_not_depend_on_how_many_there_are(n, batch):
    count, changed = 0, threading.Condition()

    def read(i):
        nonlocal count
        with changed:
            count += 1
            changed.notify_all()
        return np.zeros((2, 2, 1), np.uint8)

    stream = StreamBatches(computed(n, read), batch=batch)
    parts = -(-batch // PART)
    ahead = -(-max(cores() + 1, 2 * parts) // parts) + 1
    batches: Any = stream.train()
    for step in range(40):
        next(batches)  # step + 1 were handed out
        with changed:  # the following are read without being asked for
            assert changed.wait_for(lambda n=step: count >= (n + 3) * batch, timeout=30)
            assert count - step * batch <= (ahead + 2) * batch
    batches.close()


@pytest.mark.parametrize('sharded', [False, True])
def test_the_next_batch_goes_to_the_device_before_the_last_is_used(sharded, monkeypatch):
    mesh = jax.make_mesh((1,), ('data',))
    sharding = NamedSharding(mesh, PartitionSpec('data')) if sharded else None
    events, put = [], module.put

    def recorded(batch, where):
        assert where is sharding
        events.append(('put', int(batch['index'][0]) // 10))
        return put(batch, where)

    monkeypatch.setattr(module, 'put', recorded)
    for number, batch in enumerate(
        StreamBatches(computed(50), batch=10, sharding=sharding).evaluate()
    ):
        assert isinstance(batch['image'], jax.Array)
        assert sharding is None or batch['image'].sharding == sharding
        events.append(('used', number))
    expected = [('put', 0)]
    for number in range(4):
        expected += [('put', number + 1), ('used', number)]
    assert events == [*expected, ('used', 4)]


def test_only_the_images_of_the_process_are_read():
    asked = set()

    def read(i):
        asked.add(i)
        return np.zeros((2, 2, 1), np.uint8)

    stream = StreamBatches(computed(100, read), batch=20, process=(3, 5))
    own = {int(i) for batch in stream.evaluate() for i in batch['index'][batch['mask']]}
    assert own == {i for i in range(100) if 12 <= i % 20 < 16}
    assert asked == own
