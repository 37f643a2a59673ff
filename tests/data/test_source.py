import subprocess
import sys

import numpy as np
import pytest

from cnn_jax import config
from cnn_jax.data.source import digest, from_arrays
from cnn_jax.data.sources import open_source, open_split
from cnn_jax.errors import UserError


def two_classes(labels, class_names=('a', 'b')):
    images = np.arange(len(labels) * 4, dtype=np.uint8).reshape(-1, 2, 2, 1)
    return from_arrays('two', images, np.array(labels), class_names)


def test_an_example_is_an_image_and_a_label():
    source = two_classes([0, 1, 1])
    image, label = source[2]
    assert (image.dtype, image.tolist(), label) == (np.uint8, [[[8], [9]], [[10], [11]]], 1)
    assert (len(source), source.channels, source.sizes.tolist()) == (3, 1, [[2, 2]] * 3)
    assert (source.labels.dtype, type(label)) == (np.int32, int)


@pytest.mark.parametrize(
    ('labels', 'class_names', 'sentence'),
    [
        ([], ('a', 'b'), 'two has no images'),
        ([0, 0], ('a',), 'two has one class only'),
        ([0, 2], ('a', 'b'), 'example 1 of two has label 2, but labels run from 0 to 1'),
        ([0, -1], ('a', 'b'), 'example 1 of two has label -1'),
    ],
)
def test_a_source_that_cannot_be_classified(labels, class_names, sentence):
    with pytest.raises(UserError, match=sentence):
        two_classes(labels, class_names)


def test_the_fingerprint_covers_pixels_labels_and_class_names():
    images = np.zeros((2, 2, 2, 1), np.uint8)
    labels, names = np.array([0, 1]), ('a', 'b')
    changed = images.copy()
    changed[0, 0, 0] = 1
    prints = {
        from_arrays('same', *arguments).fingerprint
        for arguments in [
            (images, labels, names),
            (changed, labels, names),
            (images, labels[::-1].copy(), names),
            (images, labels, ('a', 'c')),
            (images.reshape(2, 4, 1, 1), labels, names),
        ]
    }
    assert len(prints) == 5
    assert from_arrays('other name', images, labels, names).fingerprint in prints


def test_digest_respects_borders():
    assert digest('ab', 'c') != digest('a', 'bc')
    assert digest('ab') == digest(b'ab')


def test_open_split_reads_the_split_of_the_config():
    data = config.Data(source='digits', train='train[:100]', eval='test[:50]')
    assert [len(open_split(data, which)) for which in ('train', 'eval')] == [100, 50]


def test_importing_costs_no_library_of_a_source():
    heavy = ['PIL', 'grain', 'tensorflow_datasets', 'sklearn', 'mlxtend', 'rich']
    script = (
        'import sys, cnn_jax.data.batches, cnn_jax.data.augment\n'
        'from cnn_jax.data import sources\n'
        'print(*sorted(set(sys.argv[1:]) & set(sys.modules)))'
    )
    ran = subprocess.run([sys.executable, '-c', script, *heavy], capture_output=True, check=True)
    assert ran.stdout.split() == []


@pytest.mark.parametrize(
    ('name', 'nearest'),
    [
        ('mnist5k', 'mnist_5k'),
        ('digit', 'digits'),
        ('folders:x', 'folder:PATH'),
        ('folder:', 'folder:PATH'),
        ('tfds', 'tfds:NAME'),
        ('mnist_5k:x', 'mnist_5k'),
        ('', 'tfds:NAME'),
    ],
)
def test_an_unknown_source_names_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f'config.data.source is .*did you mean {nearest}'):
        open_source(name, split='train')
