"""A classifier of pixels, to hold every network against: an SVM with a Gaussian kernel.

Where it is as good as the networks, a convolution has bought nothing.
"""

import itertools
import math
import time
from typing import Any

import numpy as np

from cnn_jax import config as cfg
from cnn_jax.train import setup

MOST_IMAGES, MOST_VALUES = 10_000, 10**8  # to train on, and their pixels; beyond, it takes hours
CHUNK = 256  # images judged at once
COSTS = 1.0, 10.0, 100.0
WIDTHS = 0.3, 1.0, 3.0  # factors of 1/(pixels · variance)


def train_floor(config: cfg.Config, data: setup.Data) -> dict[str, Any]:
    """Train the SVM on the images that a run of this config draws, and judge it once.

    Cost and width are those of the best accuracy on the held-out images, or else the middle ones.

    Returns:
        A result as of `train_runs`: `status`, `metrics` with the accuracy on the test images,
        `point`, `seconds`.

    Source: Cortes & Vapnik 1995, "Support-vector networks"; scikit-learn's `SVC`.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # on a worker's one core, BLAS's threads would wait for each other
        return _train(config, data)


def _train(config: cfg.Config, data: setup.Data) -> dict[str, Any]:
    from sklearn.svm import SVC

    began = time.perf_counter()
    data = setup.deal(config, data)
    train = data.train
    size = int(np.prod(train.image_shape))
    if train.n > MOST_IMAGES or train.n * size > MOST_VALUES:
        return {
            'status': 'failed',
            'reason': f'{train.n:,} images of {size:,} values are too many for the SVM',
        }
    pixels = _pixels(train, np.arange(train.n))
    variance = max(float(pixels.var()), 1e-6)

    def fit(cost: float, width: float) -> Any:
        gamma: Any = width / (size * variance)  # a number, whatever the stubs say
        machine = SVC(C=cost, gamma=gamma)
        return machine.fit(pixels, train.labels)

    def score(machine: Any, part: Any) -> float:
        chunks = np.array_split(np.arange(part.n), math.ceil(part.n / CHUNK))
        guesses = [machine.predict(_pixels(part, rows)) for rows in chunks]
        return float(np.mean(np.concatenate(guesses) == part.labels))

    machine, point = fit(COSTS[1], WIDTHS[1]), (COSTS[1], WIDTHS[1])
    if data.held_out:
        best = score(machine, data.held_out)
        for cost, width in itertools.product(COSTS, WIDTHS):
            other = fit(cost, width)
            if (found := score(other, data.held_out)) > best:
                machine, point, best = other, (cost, width), found
    accuracy = score(machine, data.test)
    return {
        'status': 'done',
        'metrics': {'test': {'accuracy': accuracy, 'count': data.test.n}},
        'point': dict(zip(('C', 'width'), point)),
        'seconds': time.perf_counter() - began,
    }


def _pixels(batches: Any, rows: np.ndarray) -> np.ndarray:
    images = batches.read(rows)
    return images.reshape(len(images), -1).astype(np.float32) / 255
