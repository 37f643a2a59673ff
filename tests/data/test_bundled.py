import numpy as np
import pytest
from sklearn.datasets import load_digits

from cnn_jax.data import sources as bundled
from cnn_jax.data.sources import digits, mnist_5k
from cnn_jax.errors import UserError


def test_mnist_5k_is_mnist():
    source = mnist_5k()
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


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='of scikit-learn is not here; run: pip install'):
        digits.__wrapped__()
