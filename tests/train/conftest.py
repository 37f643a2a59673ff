"""Small runs on made-up images, for the tests of the step and the loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.train.step import Task, make_steps, values_of

SHAPE, CLASSES = (8, 8, 1), 3


def scale(images):
    return images.astype(jnp.float32) / 127.5 - 1


@pytest.fixture
def small():
    """Makes the config of a tiny strided net with batch norm and dropout, some fields changed."""

    def make(**changes):
        base = {
            'model.stem_width': 0,
            'model.widths': (4, 6),
            'model.hidden': (8,),
            'data.batch': 8,
            'optimizer.learning_rate': 0.01,
        }
        changes = {name.replace('__', '.'): given for name, given in changes.items()}
        return cfg.validate(cfg.replace(cfg.Config(), base | changes))

    return make


@pytest.fixture
def run():
    """Makes the steps of a config, a fresh state, and the values that go with it."""

    def make(config, shape=SHAPE, **task):
        options = {'prepare': scale, 'steps_per_epoch': 10.0, 'total_steps': 50} | task
        steps = make_steps(config, Task(image_shape=shape, num_classes=CLASSES, **options))
        return steps, steps.init(config.seed), values_of(config)

    return make


@pytest.fixture
def batch():
    """Makes one of a sequence of reproducible random batches."""

    def make(number=0, size=8, shape=SHAPE):
        draw = np.random.default_rng(number)
        return {
            'image': jnp.asarray(draw.integers(0, 256, (size, *shape)), jnp.uint8),
            'label': jnp.asarray(draw.integers(0, CLASSES, size), jnp.int32),
            'index': jnp.arange(size, dtype=jnp.int32) + number * size,
            'mask': jnp.ones(size, bool),
        }

    return make
