"""Small runs on made-up images, for the tests of the step, the loop and the tools."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax import files
from cnn_jax.data.batches import DeviceBatches
from cnn_jax.data.source import from_arrays
from cnn_jax.train import loop, record, setup, step
from cnn_jax.train.manifest import claim_workdir
from cnn_jax.train.program import RunSpec, make_program, state_maker, traced_values

SHAPE, CLASSES = (8, 8, 1), 3


def scale(images):
    return images.astype(jnp.float32) / 127.5 - 1


def make_config(**changes):
    """The config of a tiny strided net with batch norm and dropout, some fields changed."""
    base = {'model.hidden': (8,), 'data.batch': 8, 'optimizer.learning_rate': 0.01}
    if 'model__name' not in changes:
        base |= {'model.stem_width': 0, 'model.widths': (4, 6)}
    changes = {name.replace('__', '.'): given for name, given in changes.items()}
    return cfg.validate(cfg.replace(cfg.Config(), base | changes))


def make_spec(shape=SHAPE, prepare=scale, steps_per_epoch=10.0, phase_ends=(50,), **options):
    return RunSpec(shape, CLASSES, prepare, steps_per_epoch, phase_ends, **options)


def begin(config, shape=SHAPE, phase=0, cached='', **options):
    """The program of a config, a fresh state, and the values that go with it."""
    program = make_program(config, make_spec(shape, **options), phase)
    program = dataclasses.replace(program, cached=cached)
    return program, state_maker(program)(config.seed), traced_values(config)


def compiled(program, function=step.train_step):
    """A function of a step, in a third of the usual time of compilation."""
    options: dict = {'xla_backend_optimization_level': 1}
    return jax.jit(functools.partial(function, program), compiler_options=options)


def gradient_step(program, state, batch, values):
    """The gradients of a step, before clipping, with batch statistics and sums."""
    config = step.bound_config(program, state, values)
    return step.step_gradients(program, config, state, batch)


def make_batch(number=0, size=8, shape=SHAPE):
    """One of a sequence of reproducible random batches."""
    draw = np.random.default_rng(number)
    return {
        'image': jnp.asarray(draw.integers(0, 256, (size, *shape)), jnp.uint8),
        'label': jnp.asarray(draw.integers(0, CLASSES, size), jnp.int32),
        'index': jnp.arange(size, dtype=jnp.int32) + number * size,
        'mask': jnp.ones(size, bool),
    }


def equal(a, b):
    """Whether two trees have the same structure and bits."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def copied(tree):
    """The arrays of a tree on the host, in memory that no step is given."""
    return jax.tree.map(np.array, tree)


def make_data(config, *splits):
    """The opened data of a run, from batches of both splits."""
    description = setup.describe(config, *splits)
    description['preprocessing'] = setup.preprocessing(config, splits[0], None)
    return setup.Data(*splits, description, None)


def made_up(seed, count, shape):
    """Noise whose brightness tells the class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, count).astype(np.int32)
    noise = draw.integers(0, 100, (count, *shape))
    images = (noise + labels[:, None, None, None] * 70).astype(np.uint8)
    return from_arrays('made up', images, labels, tuple('abc'))


def opened(config, shape=SHAPE, count=50):
    """The spec and the phases of a config, on made-up images."""
    train, evaluation = (
        DeviceBatches(made_up(seed, count, shape), batch=config.data.batch, seed=config.seed)
        for seed in (0, 1)
    )
    data = make_data(config, train, evaluation)
    spec = setup.make_spec(config, data.description)
    phases, _ = setup.open_phases(config, data, spec)
    return spec, phases


@pytest.fixture
def small():
    return make_config


@pytest.fixture
def run():
    return begin


@pytest.fixture
def batch():
    return make_batch


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Trains as `cnn_jax.fit` does, on made-up images, in a new folder."""
    monkeypatch.setattr(record, 'draw_curves', lambda lines, path: None)  # half a second each

    def make(config, folder=None, shape=SHAPE, count=50, open=opened):
        spec, phases = open(config, shape, count)
        folder = folder or tmp_path / 'run'
        claim_workdir(folder, config)
        data = {'train': {'fingerprint': ''}}
        facts = {'config_hash': cfg.content_hash(config), 'machine': {'threads': 1}, 'data': data}
        files.write_json(folder / 'manifest.json', facts)
        state = state_maker(phases[0].program)(config.seed)
        return loop.train(config, spec, phases, state, folder, live=False)

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
