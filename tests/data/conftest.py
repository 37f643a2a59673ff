"""A cache folder of its own for each test, and folders of generated images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax.config import Data
from cnn_jax.data.source import Source
from cnn_jax.data.sources import open_split


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch) -> Path:
    """The cache folder of the test, empty at its start."""
    path = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('CNN_JAX_CACHE', str(path))
    return path


@pytest.fixture
def write_images():
    """A function that fills `root/class_name/0.png, 1.png …`, each image with its own pixels."""

    def write(root: Path, counts: dict[str, int], size=(8, 6), channels: int = 3) -> Path:
        for label, (class_name, count) in enumerate(counts.items()):
            (root / class_name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = noise((*size, channels), seed=1000 * label + i)
                picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
                picture.save(root / class_name / f'{i}.png')
        return root

    return write


@pytest.fixture
def random_image():
    """A function from a shape and a seed to uint8 noise."""
    return noise


def open_source(name: str, split: str, **fields) -> Source:
    """The examples of one split of a source; `fields` are others of `config.data`."""
    return open_split(Data(source=name, eval=split, **fields), 'eval')


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
