"""This project as contenders: the step that `launch.train` runs, and the features that it keeps.

`matmul` is the yardstick: a square matrix product, the fastest arithmetic of XLA on the machine.
"""

import functools
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problem import Problem, backbone_weights
from benchmarks.worker import Contender, forward
from cnn_jax import __version__, params
from cnn_jax import config as cfg
from cnn_jax.features import Extractor
from cnn_jax.train.program import RunSpec, make_program, state_maker, traced_values
from cnn_jax.train.setup import preparation
from cnn_jax.train.step import train_step


def start(problem: Problem) -> Contender:
    """The training step of the problem's config."""
    config = config_of(problem)
    spec = RunSpec(
        image_shape=problem.images.shape[2:],
        num_classes=problem.classes,
        prepare=preparation(problem.preprocessing),
        steps_per_epoch=1.0,
        phase_ends=(1,),
        pretrained=lambda _: params.unflatten(
            {f'params/{path}': jax.numpy.array(value) for path, value in problem.weights.items()}
        ),
    )
    program = make_program(config, spec)
    init = state_maker(program)
    step = jax.jit(functools.partial(train_step, program), donate_argnums=0)
    batches = batches_of(problem)
    values = traced_values(config)
    without_dropout = {**values, 'model.dropout': 0.0, 'model.head_dropout': 0.0}
    state, endless = init(0), itertools.cycle(batches)

    def losses(count: int) -> list[float]:
        state, found = init(0), []
        for batch in itertools.islice(itertools.cycle(batches), count):
            state, sums = step(state, batch, without_dropout)
            found.append(float(sums['objective']))
        return found

    def run(count: int) -> None:
        nonlocal state
        for batch in itertools.islice(endless, count):
            state, _ = step(state, batch, values)
        jax.block_until_ready(state)

    return Contender(losses, run, f'cnn_jax {__version__}')


def config_of(problem: Problem) -> cfg.Config:
    """The problem's config."""
    return cfg.from_json(json.dumps(problem.config))


def batches_of(problem: Problem) -> list[dict[str, jax.Array]]:
    """The problem's batches on the device, as a step takes them."""
    size = problem.images.shape[1]
    every = {'index': np.arange(size, dtype=np.int32), 'mask': np.ones(size, bool)}
    pairs = zip(problem.images, problem.labels)
    return jax.device_put([{'image': images, 'label': labels, **every} for images, labels in pairs])


def features(problem: Problem) -> Contender:
    """Uint8 images in, features out, both in NumPy."""
    extractor = Extractor(
        config_of(problem),
        problem.classes,
        preparation(problem.preprocessing),
        problem.preprocessing,
        jax.device_put({'params': {'backbone': params.unflatten(backbone_weights(problem))}}),
    )
    compute = extractor.function(None)
    index = np.arange(problem.images.shape[1], dtype=np.int32)

    def computed(images: np.ndarray) -> np.ndarray:
        source = SimpleNamespace(n=len(images), read=lambda index: images[index])
        return extractor.compute_batch(compute, source, index)

    return forward(computed, list(problem.images), f'cnn_jax {__version__}')


SIZE = 2048
FLOPS = 2 * SIZE**3


def matmul(problem: Problem) -> Contender:
    """One step is a product of two float32 matrices of `SIZE`²."""
    del problem
    multiply = jax.jit(jnp.matmul)
    a = jax.random.normal(jax.random.key(0), (SIZE, SIZE))

    def run(count: int) -> None:
        for _ in range(count):
            product = multiply(a, a)
        jax.block_until_ready(product)

    return Contender(lambda _: [], run, f'jax {jax.__version__}')
