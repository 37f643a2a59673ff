import numpy as np
import pytest

from cnn_jax.data import batches as memory
from cnn_jax.data.batches import load
from cnn_jax.data.decode import resize_image
from cnn_jax.data.source import from_arrays
from cnn_jax.data.sources import open_source


@pytest.fixture
def folder(tmp_path, write_images):
    write_images(tmp_path / 'set', {'a': 4, 'b': 3}, size=(8, 12))
    return lambda: open_source(f'folder:{tmp_path}/set', split='all')


@pytest.mark.parametrize('how', [('none', 0, 0), ('stretch', 5, 0), ('crop', 5, 1), ('crop', 9, 3)])
def test_every_example_is_prepared(folder, how):
    source = folder()
    arrays = load(source, *how)
    expected = np.stack([resize_image(source[i][0], *how) for i in range(len(source))])
    np.testing.assert_array_equal(arrays.images, expected)
    assert arrays.images.dtype == np.uint8
    assert arrays.labels.tolist() == [0] * 4 + [1] * 3
    assert arrays.class_names == ('a', 'b')
    assert arrays.fingerprint == source.fingerprint


def test_arrays_are_loaded_without_a_file(cache_dir, random_image):
    images = random_image((40, 3, 4, 1))
    arrays = load(from_arrays('set', images, np.arange(40) % 2, ('a', 'b')))
    np.testing.assert_array_equal(arrays.images, images)
    assert list(cache_dir.iterdir()) == []


def test_files_are_decoded_once(folder, monkeypatch):
    first = load(folder(), 'crop', 5)

    def fail(*_):
        raise AssertionError('decoded again')

    monkeypatch.setattr(memory, 'resize_image', fail)
    second = load(folder(), 'crop', 5)
    np.testing.assert_array_equal(first.images, second.images)
    for other in (('stretch', 5), ('crop', 6), ('crop', 5, 1)):
        with pytest.raises(AssertionError, match='decoded again'):
            load(folder(), *other)


def test_another_decoder_decodes_again(folder, monkeypatch, cache_dir):
    load(folder())
    monkeypatch.setattr(memory, 'RULE', memory.RULE + 1)
    load(folder())
    monkeypatch.setattr('PIL.__version__', 'another')
    load(folder())
    assert len(list(cache_dir.glob('images/*.npy'))) == 3
