import itertools
import json
import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from cnn_jax import config
from cnn_jax.data.batches import (
    DeviceBatches,
    StreamBatches,
    eval_batches,
    open_batches,
    train_indices,
)
from cnn_jax.data.decode import resize_image
from cnn_jax.data.sources import open_source
from cnn_jax.errors import UserError

PROVIDERS = {'never': DeviceBatches, 'always': StreamBatches}


def first(batches, count):
    """The first batches, as NumPy arrays; the iterator is closed."""
    taken = [jax.device_get(batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return taken


def assert_same(a, b):
    assert len(a) == len(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path, write_images) -> config.Data:
    write_images(tmp_path, {'a': 9, 'b': 8}, size=(8, 12))
    return config.Data(source=f'folder:{tmp_path}', resize='crop', size=5, batch=4)


@pytest.fixture(params=['digits', 'folder'])
def data(request, folder) -> config.Data:
    return {'folder': folder, 'digits': config.Data(source='digits', batch=32)}[request.param]


@pytest.mark.parametrize('stream', PROVIDERS)
def test_batches_are_the_sources_examples_in_order(folder, stream):
    folder.stream = stream
    source = open_source(folder.source, split='train')
    train = open_batches(folder, 'train', seed=3)
    for step, batch in enumerate(first(train.train(), 5)):
        index = train_indices(len(source), 4, 3, step)
        np.testing.assert_array_equal(batch['index'], index)
        np.testing.assert_array_equal(batch['label'], source.labels[index])
        images = [resize_image(source[i][0], 'crop', 5) for i in index]
        np.testing.assert_array_equal(batch['image'], images)
        assert batch['mask'].all()
    assert {key: (v.dtype, v.shape) for key, v in batch.items()} == {
        'image': (np.uint8, (4, 5, 5, 3)),
        'label': (np.int32, (4,)),
        'index': (np.int32, (4,)),
        'mask': (bool, (4,)),
    }


def test_both_providers_give_the_same_batches(data):
    device, stream = (
        open_batches(config.replace(config.Config(data=data), {'data.stream': kind}).data, 'train')
        for kind in PROVIDERS
    )
    for start in (0, 1, device.n // data.batch - 1, 1000):
        assert_same(first(device.train(start), 4), first(stream.train(start), 4))
    index = np.array([3, 0, 3])
    np.testing.assert_array_equal(device.read(index), stream.read(index))
    for name in ('n', 'class_names', 'image_shape', 'fingerprint', 'skipped'):
        assert getattr(device, name) == getattr(stream, name)
    np.testing.assert_array_equal(device.labels, stream.labels)


@pytest.mark.parametrize('stream', PROVIDERS)
def test_a_start_in_the_middle_is_the_same_run(data, stream):
    data.stream = stream
    batches = open_batches(data, 'train', seed=1)
    whole = first(batches.train(), 7)
    assert_same(first(batches.train(3), 4), whole[3:])


@pytest.mark.parametrize('stream', PROVIDERS)
def test_evaluation_takes_every_example_once(data, stream):
    data.stream = stream
    batches = open_batches(data, 'eval')
    taken = list(map(jax.device_get, batches.evaluate()))
    for batch, (index, mask) in zip(taken, eval_batches(batches.n, data.batch), strict=True):
        np.testing.assert_array_equal(batch['index'], index)
        np.testing.assert_array_equal(batch['mask'], mask)
        np.testing.assert_array_equal(batch['image'], batches.read(index))
        np.testing.assert_array_equal(batch['label'], batches.labels[index])


@pytest.mark.parametrize('stream', PROVIDERS)
@pytest.mark.parametrize('count', [2, 3, 5])
def test_the_processes_batches_make_the_global_one(stream, count):
    data = config.Data(source='digits', stream=stream, batch=30)
    for which in ('train', 'eval'):
        start = {'train': lambda batches: batches.train(46), 'eval': lambda b: b.evaluate()}[which]
        whole = first(start(open_batches(data, which)), 3)
        parts = [
            first(start(open_batches(data, which, process_index=p, process_count=count)), 3)
            for p in range(count)
        ]
        joined = [jax.tree.map(lambda *xs: np.concatenate(xs), *batch) for batch in zip(*parts)]
        assert_same(joined, whole)


def test_a_batch_that_processes_cannot_share():
    with pytest.raises(UserError, match='batch of 32 examples cannot be divided among 3'):
        open_batches(config.Data(source='digits'), 'train', process_count=3)


def test_the_decoded_size_decides(folder):
    folder.memory_gb = 13 * 5 * 5 * 3 / 1e9  # the 13 training images, to the byte
    assert type(open_batches(folder, 'train')) is DeviceBatches
    folder.memory_gb -= 1e-9
    assert type(open_batches(folder, 'train')) is StreamBatches
    for kind, provider in PROVIDERS.items():
        folder.stream = kind
        assert type(open_batches(folder, 'train')) is provider


def test_evaluation_has_a_batch_size_of_its_own():
    data = config.Data(source='digits', batch=20)
    assert next(open_batches(data, 'eval').evaluate())['label'].shape == (20,)
    data.eval_batch = 7
    assert next(open_batches(data, 'eval').evaluate())['label'].shape == (7,)


def test_a_training_batch_larger_than_the_data(folder):
    folder.batch = 14
    with pytest.raises(UserError, match=r'config.data.batch is 14, but folder:.* 13 examples'):
        open_batches(folder, 'train')
    (batch,) = open_batches(folder, 'eval').evaluate()  # here the rest is padding
    assert batch['mask'].sum() == 4


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
    with pytest.raises(UserError, match=r'2 of the 17 images .* --config.data.max_corrupt from'):
        open_batches(folder, 'train')
    folder.max_corrupt = 2 / 17
    device, stream = (
        open_batches(config.replace(config.Config(data=folder), {'data.stream': kind}).data, 'eval')
        for kind in PROVIDERS
    )
    assert [path for path, _ in device.skipped] == ['a/3.png', 'b/1.png']
    assert (device.skipped, device.fingerprint) == (stream.skipped, stream.fingerprint)
    assert_same(list(device.evaluate()), list(stream.evaluate()))


def test_an_error_while_streaming_reaches_the_consumer(folder, tmp_path):
    folder.stream = 'always'
    batches = open_batches(folder, 'train')
    (tmp_path / 'a/0.png').unlink()
    with pytest.raises(UserError, match=r'a/0\.png has changed since the run began'):
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
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
    ran = subprocess.run(
        [sys.executable, '-c', SHARDED, axis_type],
        env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        check=True,
    )
    same = json.loads(ran.stdout)
    assert len(same) == 2 * 2 * 3 * 8
    assert all(same)
