"""Small runs on made-up images, for the tests of the step and the loop."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.data.batches import Arrays, DeviceBatches
from cnn_jax.train import loop, record, setup, workdir
from cnn_jax.train.step import make_steps, values_of
from cnn_jax.train.task import Task
from cnn_jax.validation import validate

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
        return validate(cfg.replace(cfg.Config(), base | changes))

    return make


@pytest.fixture
def run():
    """Makes the steps of a config, a fresh state, and the values that go with it."""

    def make(config, shape=SHAPE, phase=0, cached=False, **task):
        options = {'prepare': scale, 'steps_per_epoch': 10.0, 'ends': (50,)} | task
        task = Task(image_shape=shape, num_classes=CLASSES, **options)
        steps = make_steps(config, task, phase, cached)
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


def opened(config, shape, count):
    """The task and the phases of a config, on made-up images that carry their class."""
    train, evaluation = (
        DeviceBatches(made_up(seed, count, shape), batch=config.data.batch, seed=config.seed)
        for seed in (0, 1)
    )
    description = setup.describe(config, train, evaluation)
    description['preprocessing'] = setup.preprocessing(config, train, None)
    task = setup.make_task(config, description)
    phases, _ = setup.open_phases(config, description, task, train, evaluation)
    return task, phases


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Trains as launch.train does, on made-up images that carry their class, in a new folder."""
    monkeypatch.setattr(record, 'draw_curves', lambda lines, path: None)  # half a second each

    def make(config, folder=None, shape=SHAPE, count=50, open=opened):
        task, phases = open(config, shape, count)
        folder = folder or tmp_path / 'run'
        workdir.claim(folder, config)
        state = phases[0].steps.init(config.seed)
        return loop.fit(config, task, phases, state, folder, live=False)

    return make


@pytest.fixture(scope='module')
def kept():
    """`opened`, which keeps what it has opened: its functions are traced once."""
    made = {}

    def open(config, *rest):
        key = cfg.to_json(config), rest
        if key not in made:
            made[key] = opened(config, *rest)
        return made[key]

    return open


@pytest.fixture
def fit_again(fit, kept):
    """`fit`, quicker for a config that it has trained before."""
    return functools.partial(fit, open=kept)


def made_up(seed, count, shape):
    """Noise whose brightness tells the class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, count).astype(np.int32)
    noise = draw.integers(0, 100, (count, *shape))
    images = (noise + labels[:, None, None, None] * 70).astype(np.uint8)
    return Arrays(images, labels, tuple('abc'), f'made up {seed} {count} {shape}')
