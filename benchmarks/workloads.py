"""The problems that are measured."""

import dataclasses
import json
import math
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.problem import Problem
from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.errors import UserError
from cnn_jax.models import build
from cnn_jax.pretrained.weights import Pretrained
from cnn_jax.summary import layers
from experiments import finetune_vgg16, small, strided

BATCHES = 20
# Adam's first steps are of this size in every direction, rounding errors' too: at 1e-4 the losses
# of equal networks part by 5e-4 within 20 steps, at this rate by 2e-5.
LEARNING_RATE = 1e-5

PHOTOGRAPHS, SIZE = ('china', 'flower'), 224

# Name: the experiment whose network and optimizer it has, height and width, channels, classes.
STEPS = {
    'strided96': (strided.get_config, (96, 96, 3), 10),
    'small28': (small.get_config, (28, 28, 1), 10),
}


def step_problem(name: str, batch: int = 0) -> Problem:
    """Random images of random classes for one of `STEPS`, by default in the experiment's batches.

    Nothing is augmented and the learning rate is constant: the network's step alone is measured.
    """
    make, shape, classes = STEPS[name]
    config = make()
    config.augment = cfg.Augment()
    config.optimizer = cfg.Optimizer(learning_rate=LEARNING_RATE)
    config.data.batch = batch or config.data.batch
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCHES, config.data.batch, *shape), np.uint8)
    labels = rng.integers(0, classes, images.shape[:2], np.int32)
    return problem(config, standardize(shape[-1]), images, labels, classes)


def standardize(channels: int) -> dict:
    """The preprocessing of random images."""
    facts = {'mean': [0.5] * channels, 'std': [0.29] * channels, 'channels': channels}
    return {'kind': 'standardize', **facts}


def features_problem(batch: int, weights: Pretrained) -> Problem:
    """Two batches of crops of photographs for the frozen convolutions of VGG16."""
    draw = np.random.default_rng(0)
    images = np.stack([each for name in PHOTOGRAPHS for each in crops(name, batch, draw)])
    return Problem(
        dataclasses.asdict(finetune_vgg16.get_config()),
        {'kind': weights.preprocessing.name},
        images.reshape(batch, 2, *images.shape[1:]).swapaxes(0, 1),  # both in each batch
        np.zeros((2, batch), np.int32),
        2,
        {f'backbone/{path}': value for path, value in params.flatten(weights.params).items()},
    )


def crops(name: str, count: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """Random parts, uint8 [224, 224, 3], of one of scikit-learn's photographs."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise UserError('scikit-learn has the photographs: `pip install scikit-learn`') from error
    whole = load_sample_image(f'{name}.jpg')
    for _ in range(count):
        top, left = (draw.integers(0, n - SIZE) for n in whole.shape[:2])
        yield whole[top : top + SIZE, left : left + SIZE]


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
        dataclasses.asdict(config), preprocessing, images, labels, classes, weights | (known or {})
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
