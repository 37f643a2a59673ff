"""A network, its initial weights and its batches as one file: what every contender starts from.

Reading it needs NumPy alone, so that a peer can do so in an environment of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


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
    facts = {
        'config': problem.config,
        'preprocessing': problem.preprocessing,
        'classes': problem.classes,
    }
    arrays: dict[str, Any] = {
        'facts': json.dumps(facts),
        'images': problem.images,
        'labels': problem.labels,
    }
    arrays |= {f'weights/{name}': value for name, value in problem.weights.items()}
    np.savez(path, **arrays)


def read(path: Path) -> Problem:
    """The problem that `write` kept."""
    with np.load(path) as file:
        weights = {
            name.removeprefix('weights/'): file[name]
            for name in file
            if name.startswith('weights/')
        }
        facts = json.loads(str(file['facts']))
        return Problem(images=file['images'], labels=file['labels'], weights=weights, **facts)
