import gzip
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnn_jax.data.sources import open_source
from cnn_jax.errors import UserError
from tests.damage import damaged

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
}


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_spelling_gives_the_values(tmp_path, values, spelling):
    name = write(tmp_path, values, *SPELLINGS[spelling])
    for split in ('train', 'test'):
        source = open_source(name, split=split)
        images = np.stack([source[i][0][..., 0] for i in range(len(source))])
        np.testing.assert_array_equal(images, values[f'{split} images'])
        np.testing.assert_array_equal(source.labels, values[f'{split} labels'])
        assert source.class_names == ('0', '1', '2')


def test_real_digits_survive(tmp_path):
    digits = open_source('digits', split='all')
    images = np.stack([digits[i][0][..., 0] for i in range(len(digits))])
    name = write(tmp_path, {'train images': images, 'train labels': digits.labels})
    assert open_source(name, split='all').fingerprint == digits.fingerprint


def test_without_test_files_the_training_set_is_divided(tmp_path, values):
    name = write(tmp_path, {key: values[key] for key in ('train images', 'train labels')})
    assert [len(open_source(name, split=split)) for split in ('train', 'test')] == [9, 3]


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match='nowhere is not a folder'):
        open_source(f'idx:{tmp_path}/nowhere', split='train')


def test_a_folder_without_idx_files(tmp_path):
    with pytest.raises(UserError, match='has no train-images-idx3-ubyte'):
        open_source(f'idx:{tmp_path}', split='train')


def test_missing_labels(tmp_path, values):
    name = write(tmp_path, {'train images': values['train images']})
    with pytest.raises(UserError, match='has no train-labels-idx1-ubyte'):
        open_source(name, split='train')


def test_counts_that_differ(tmp_path, values):
    name = write(tmp_path, values | {'train labels': np.arange(11) % 3})
    with pytest.raises(UserError, match='has 12 train images but 11 train labels'):
        open_source(name, split='train')


def test_a_test_label_that_training_lacks(tmp_path, values):
    name = write(tmp_path, values | {'test labels': np.array([0, 1, 2, 3, 0, 1])})
    with pytest.raises(UserError, match=r'example 3 of .* has label 3, but labels run from 0 to 2'):
        open_source(name, split='test')


def test_no_images(tmp_path):
    name = write(tmp_path, {'train images': np.zeros((0, 5, 4)), 'train labels': np.zeros(0)})
    with pytest.raises(UserError, match='has no images'):
        open_source(name, split='train')


def test_one_class(tmp_path, values):
    name = write(tmp_path, values | {'train labels': np.zeros(12)})
    with pytest.raises(UserError, match='has one class only'):
        open_source(name, split='train')


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (lambda data: b'\0\0\x08\x01' + data[4:], 'starts with 00 00 08 01, not 00 00 08 03'),
        (lambda data: b'\0\0\x0d\x03' + data[4:], 'starts with 00 00 0d 03, not 00 00 08 03'),
        (lambda data: b'', 'is not an IDX file of images: it starts with'),
        (lambda data: data[:-1], 'is not whole: it says 12×5×4 values and has 239'),
        (lambda data: data + b'\0', 'is not whole: it says 12×5×4 values and has more'),
        (lambda data: data[:7], 'is not whole'),
        (lambda data: data[:8] + bytes(4) + data[12:], 'no images of a usable size: it says 12×0'),
        (lambda data: gzip.compress(data)[:-9], 'is not whole'),
        (lambda data: gzip.compress(data)[:20] + b'damage', 'is not whole'),
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
    with pytest.raises(UserError, match=r'is not read|is not whole|no images of a usable size'):
        open_source(name, split='train')
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_gzip_bomb_is_not_unpacked(tmp_path, values, monkeypatch):
    """A header that agrees with what is packed, 1,000 times larger than the file."""
    monkeypatch.setattr('cnn_jax.data.sources.LARGE', 1 << 20)
    name = write(tmp_path, values)
    zeros = HEAD + struct.pack('>3I', 2_000, 100, 100) + bytes(20_000_000)
    (tmp_path / NAMES['train images']).write_bytes(gzip.compress(zeros))
    with pytest.raises(UserError, match='is not read: it says 2000×100×100 values'):
        open_source(name, split='train')


@settings(
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
