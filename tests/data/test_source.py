"""Sources from arrays: what is taken, what is refused, and what the fingerprint covers."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data.source import as_source, digest, from_arrays
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
        ([0, 1], ('a', 'a'), 'two has two classes of one name'),
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


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ('images', 'labels'),
    [
        (IMAGES, LABELS),
        (IMAGES / 255, LABELS.tolist()),
        (jnp.asarray(IMAGES / 255, jnp.float32), jnp.asarray(LABELS)),
        (IMAGES.astype(np.float32), LABELS[:, None].astype(np.uint8)),
    ],
    ids=['uint8', 'floats to 1', 'JAX', 'floats to 255'],
)
def test_arrays_are_a_source(images, labels):
    source = as_source((images, labels))
    np.testing.assert_array_equal(np.stack([source[i][0] for i in range(6)]), IMAGES)
    assert source.labels.tolist() == LABELS.tolist()
    assert source.class_names == ('0', '1', '2')
    assert source.fingerprint == as_source((IMAGES, LABELS)).fingerprint


def test_class_names_are_given_or_taken_from_elsewhere():
    assert as_source((IMAGES, LABELS, 'abc')).class_names == ('a', 'b', 'c')
    assert as_source((IMAGES, LABELS, np.arange(3))).class_names == ('0', '1', '2')
    source = as_source((IMAGES, LABELS * 0), class_names=('x', 'y'))
    assert source.class_names == ('x', 'y')
    assert as_source(source) is source


@pytest.mark.parametrize(
    ('data', 'word'),
    [
        (IMAGES, 'ndarray'),
        ((IMAGES,), 'tuple'),
        ((IMAGES[..., 0], LABELS), r'images\[\.\.\., None\]'),
        ((IMAGES.transpose(0, 3, 1, 2), LABELS), 'transpose'),
        ((IMAGES[..., :2], LABELS), 'channels'),
        ((IMAGES.astype(np.int64), LABELS), 'int64'),
        ((IMAGES / 128 - 1, LABELS), 'normalization'),
        ((IMAGES * 1.5, LABELS), 'between'),
        ((IMAGES * np.nan, LABELS), 'nan'),
        ((IMAGES, LABELS[:5]), '6 images but 5 labels'),
        ((IMAGES, np.eye(3)[LABELS]), 'argmax'),
        ((IMAGES, LABELS.astype(float)), 'integers'),
        ((IMAGES[:0], LABELS[:0]), 'no images'),
    ],
)
def test_arrays_that_are_no_source(data, word):
    with pytest.raises(UserError, match=word):
        as_source(data, 'the training data')
