"""Sets prepared for real, to ArrayRecord in a temporary folder, and read back."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnn_jax.data.batches import load
from cnn_jax.errors import UserError
from tests.data.conftest import open_source

CLASSES = ('disc', 'square', 'star')
SHAPES = [(5 + i % 3, 4 + i % 2) for i in range(30)]


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*SHAPES[i], 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    return file.getvalue()


IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format='png')
LABEL = tfds.features.ClassLabel(names=CLASSES)


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set with the features and, by part, the examples that a sub-class states."""

    VERSION = tfds.core.Version('1.0.0')

    def features(self):
        return {'image': IMAGE, 'label': LABEL}

    def examples(self):
        return {
            'train': [(png(pixels(i)), i % 3) for i in range(20)],
            'test': [(png(pixels(i)), i % 3) for i in range(20, 30)],
        }

    def _info(self):
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {part: self._generate_examples(part) for part in self.examples()}

    def _generate_examples(self, part):
        for i, values in enumerate(self.examples()[part]):
            yield i, dict(zip(self.features(), values))


class TinyShapes(Builder):
    """PNG bytes and labels."""


class TinyGrey(Builder):
    """One channel, one part."""

    def features(self):
        return {'image': tfds.features.Image(shape=(4, 4, 1)), 'label': LABEL}

    def examples(self):
        return {'train': [(png(np.full((4, 4), i, np.uint8)), i % 3) for i in range(15)]}


class TinyUnlabelled(Builder):
    """The test labels are unknown, as ImageNet's are."""

    def examples(self):
        return super().examples() | {'test': [(png(pixels(i)), -1) for i in range(20, 30)]}


class TinyDamaged(Builder):
    """One image of 150 is cut off."""

    def examples(self):
        ends = [40 if i == 7 else None for i in range(150)]
        return {'train': [(png(pixels(i % 20))[:end], i % 3) for i, end in enumerate(ends)]}


class TinyText(Builder):
    """No image."""

    def features(self):
        return {'text': tfds.features.Text(), 'label': LABEL}


class TinyFloats(Builder):
    """Images of floats."""

    def features(self):
        image = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)
        return {'image': image, 'label': LABEL}


class TinyBroken(Builder):
    """Cannot be made."""

    def _split_generators(self, dl_manager):
        raise OSError('the server\nis gone')


@pytest.fixture
def data_dir(tmp_path) -> str:
    return str(tmp_path / 'tfds')


def test_a_set_is_prepared_and_read(data_dir):
    train = open_source('tfds:tiny_shapes', split='train', data_dir=data_dir)
    test = open_source('tfds:tiny_shapes', split='test', data_dir=data_dir)
    assert (len(train), len(test), train.class_names, train.channels) == (20, 10, CLASSES, 3)
    # TFDS shuffles while it prepares, so examples are recognized by their pixels.
    known = {pixels(i).tobytes(): i for i in range(30)}
    for source, expected in ((train, range(20)), (test, range(20, 30))):
        found = [known[source[k][0].tobytes()] for k in range(len(source))]
        assert sorted(found) == list(expected)
        assert source.labels.tolist() == [i % 3 for i in found]
        assert source.sizes.tolist() == [list(SHAPES[i]) for i in found]
    assert load(train, 'crop', 4).shape == (20, 4, 4, 3)


def test_the_fingerprint_is_of_the_content(tmp_path):
    prints = [
        open_source(f'tfds:{name}', split=split, data_dir=str(tmp_path / folder)).fingerprint
        for folder, name, split in [
            ('one', 'tiny_shapes', 'train'),
            ('two', 'tiny_shapes', 'train'),
            ('one', 'tiny_shapes', 'test'),
            ('one', 'tiny_unlabelled', 'train'),
        ]
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_damaged_record_is_skipped(data_dir):
    source = open_source('tfds:tiny_damaged', split='all', data_dir=data_dir)
    assert len(source) == 149
    ((where, reason),) = source.skipped
    assert where.startswith('tfds:tiny_damaged train record ')
    assert reason
    assert load(source, 'crop', 4).shape == (149, 4, 4, 3)
    with pytest.raises(UserError, match='1 of the 150 images'):
        open_source('tfds:tiny_damaged', split='all', data_dir=data_dir, max_corrupt=0.006)


DAMAGE = {
    'cut off': lambda data: data[: len(data) // 2],
    'empty': lambda data: b'',
    'zeros': lambda data: bytes(len(data)),
    'changed': lambda data: data[:40] + b'\xff' * 40 + data[80:],
}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('file', ['tiny_shapes-train.array_record-*', 'dataset_info.json'])
def test_damaged_files_of_a_set(data_dir, damage, file):
    open_source('tfds:tiny_shapes', split='test', data_dir=data_dir)
    (path,) = Path(data_dir).rglob(file)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r'tfds:tiny_shapes.* is damaged \(.+\); delete it there'):
        open_source('tfds:tiny_shapes', split='train', data_dir=data_dir)


def test_a_record_that_is_damaged_while_it_is_used(data_dir, monkeypatch):
    source = open_source('tfds:tiny_shapes', split='train', data_dir=data_dir)
    monkeypatch.setattr('cnn_jax.data.decode.decode', lambda data: [][0])
    with pytest.raises(UserError, match=r'tfds:tiny_shapes train record 3 in .* is damaged'):
        source[3]


class TinyArrays(Builder):
    """Its builder hands over arrays, which TensorFlow encodes."""

    def examples(self):
        return {'train': [(np.zeros((2, 2, 3), np.uint8), 0)]}


def test_tensorflow_is_needed_to_prepare_arrays_and_for_nothing_else(data_dir):
    with pytest.raises(UserError, match=r'is not prepared in .* needs tensorflow; run once: pip'):
        open_source('tfds:tiny_arrays', split='train', data_dir=data_dir)
    source = open_source('tfds:tiny_shapes', split='train', data_dir=data_dir)
    assert source[0][0].any()
    assert 'tensorflow' not in sys.modules


# Mistakes.


@pytest.mark.parametrize(
    ('name', 'sentence'),
    [
        ('cifar_10', 'did you mean tfds:cifar10'),
        ('tiny_broken', 'preparing it failed: the server is gone'),
        ('tiny_text', r'not an image classification set.*text, label'),
        ('tiny_floats', 'floats'),
    ],
)
def test_sets_that_cannot_be_used(data_dir, name, sentence):
    with pytest.raises(UserError, match=sentence):
        open_source(f'tfds:{name}', split='train', data_dir=data_dir)


def test_labels_that_are_not_known(data_dir):
    assert len(open_source('tfds:tiny_unlabelled', split='train', data_dir=data_dir)) == 20
    with pytest.raises(UserError, match='has label -1, but labels run from 0 to 2'):
        open_source('tfds:tiny_unlabelled', split='test', data_dir=data_dir)


def test_a_set_in_another_format(data_dir):
    open_source('tfds:tiny_grey', split='all', data_dir=data_dir)
    info = Path(data_dir, 'tiny_grey/1.0.0/dataset_info.json')
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UserError, match=r'prepared in .* as tfrecord; set config.data.data_dir'):
        open_source('tfds:tiny_grey', split='all', data_dir=data_dir)
