"""The problems that are measured."""

import dataclasses
import json
import math

import jax
import numpy as np

from benchmarks.problem import Problem
from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.models.build import build
from cnn_jax.models.summary import layers
from experiments import small, strided

BATCHES = 20
# Adam's first steps are of this size in every direction, rounding errors' too: a larger one would
# make the losses of equal networks part within a few steps.
LEARNING_RATE = 1e-4

# Name: the experiment whose network and optimizer it has, height and width, channels, classes.
STEPS = {
    'strided96': (strided.get_config, (96, 96, 3), 10),
    'small28': (small.get_config, (28, 28, 1), 10),
}


def step_problem(name: str, batch: int = 0) -> Problem:
    """Random images of random classes for one of `STEPS`.

    Nothing is augmented and the learning rate is constant: the network's step alone is measured.

    Args:
        name: In `STEPS`.
        batch: Examples a step; 0 is the experiment's own number.
    """
    make, shape, classes = STEPS[name]
    config = make()
    config.augment = cfg.Augment()
    config.optimizer = cfg.Optimizer(learning_rate=LEARNING_RATE)
    config.data.batch = batch or config.data.batch
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCHES, config.data.batch, *shape), np.uint8)
    labels = rng.integers(0, classes, images.shape[:2], np.int32)
    channels = shape[-1]
    standardize = {
        'kind': 'standardize',
        'mean': [0.5] * channels,
        'std': [0.29] * channels,
        'channels': channels,
    }
    return problem(config, standardize, images, labels, classes)


def problem(
    config: cfg.Config,
    preprocessing: dict,
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    known: dict[str, np.ndarray] | None = None,
) -> Problem:
    """A problem whose initial weights, but for the `known` ones, are drawn here.

    kernel ~ N(0, 2/fan-in); bias 0, scale 1.
    """
    model = build(config.model, classes)
    x = jax.ShapeDtypeStruct((1, *images.shape[2:-1], preprocessing.get('channels', 3)), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)['params']
    rng = np.random.default_rng(1)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith('kernel'):
            scale = math.sqrt(2 / math.prod(shape[:-1]))
            return scale * rng.standard_normal(shape, np.float32)
        return np.full(shape, float(path.endswith('scale')), np.float32)

    weights = {path: draw(path, leaf.shape) for path, leaf in params.flatten(shapes).items()}
    return Problem(
        dataclasses.asdict(config),
        preprocessing,
        images,
        labels,
        classes,
        weights | (known or {}),
    )


def training_flops(problem: Problem) -> int:
    """Multiplications and additions of one step's matrix products.

    3 · forward − those of the first layer: no gradient with respect to the images is needed.
    """
    config = cfg.from_json(json.dumps(problem.config))
    batch, *image = problem.images.shape[1:]
    image[-1] = problem.preprocessing['channels']
    each = [row.flops for row in layers(build(config.model, problem.classes), tuple(image))]
    first = next(flops for flops in each if flops)
    return batch * (3 * sum(each) - first)
