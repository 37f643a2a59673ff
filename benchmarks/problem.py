"""A network, its initial weights and its batches as one file: what every contender starts from.

Reading it needs NumPy alone, so that a peer can do so in an environment of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and convolutions of each block


@dataclass(frozen=True)
class Problem:
    """What is to be trained, and on what.

    Attributes:
        config: Of `cnn_jax.config`, as nested dicts; schedule and augmentation are not used.
        preprocessing: How uint8 pixels become the network's input, as `cnn_jax.train.setup` says.
        images: uint8 [batches, b, h, w, c]; taken in turn.
        labels: int32 [batches, b].
        classes: How many there are.
        weights: Initial parameters by path, float32.
    """

    config: dict[str, Any]
    preprocessing: dict[str, Any]
    images: np.ndarray
    labels: np.ndarray
    classes: int
    weights: dict[str, np.ndarray]


def write(problem: Problem, path: Path) -> None:
    """Keep a problem as .npz."""
    facts = {name: getattr(problem, name) for name in ('config', 'preprocessing', 'classes')}
    weights: dict[str, Any] = {f'weights/{name}': value for name, value in problem.weights.items()}
    images = {'images': problem.images, 'labels': problem.labels}
    np.savez(path, facts=json.dumps(facts), **images, **weights)


def read(path: Path) -> Problem:
    """The problem that `write` kept."""
    with np.load(path) as file:
        weights = _below(file, 'weights/')
        facts = json.loads(str(file['facts']))
        return Problem(images=file['images'], labels=file['labels'], weights=weights, **facts)


def prepared(problem: Problem) -> np.ndarray:
    """The images as float32, for those who prepare them once and keep them in memory."""
    x = problem.images.astype(np.float32)
    if problem.preprocessing['kind'] == 'caffe':
        return caffe(x)
    mean, std = (np.array(problem.preprocessing[name], np.float32) for name in ('mean', 'std'))
    return (x / 255 - mean) / std


def caffe(x: np.ndarray) -> np.ndarray:
    """Red, green and blue from 0 to 255 as VGG16 takes them: blue first, centred."""
    return x[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32)


def kernels(problem: Problem) -> dict[str, np.ndarray]:
    """The initial kernels by their layer's name; every bias starts at 0 and every scale at 1."""
    return {
        path.split('/')[-2]: value
        for path, value in problem.weights.items()
        if path.endswith('/kernel')
    }


def backbone_weights(problem: Problem) -> dict[str, np.ndarray]:
    """The initial weights of the frozen convolutions, without that prefix of their paths."""
    return _below(problem.weights, 'backbone/')


def _below(arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def photographs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as VGG16 takes them, and labels, of a folder with one for each class."""
    from PIL import Image

    paths = sorted(folder.glob('*/*'))
    names = sorted({path.parent.name for path in paths})
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in paths])
    labels = np.array([names.index(path.parent.name) for path in paths], np.float32)
    return caffe(pixels.astype(np.float32)), labels
