"""The training steps of a config, compiled for a TPU topology that is not here.

libtpu is a compiler as well as a driver: it needs no TPU to compile for one. Call `prepare` before
JAX is first used, so that this process does not look for a TPU and keeps to its CPU.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax import config as cfg
from cnn_jax.data.decode import image_shape
from cnn_jax.data.sources import open_split
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.mesh import Layout, make_mesh
from cnn_jax.models import build
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.scaling.chips import Topology
from cnn_jax.train import setup
from cnn_jax.train.shared import jitted
from cnn_jax.train.step import Steps, values_of
from cnn_jax.train.task import Task

# None of them changes what is compiled: libtpu is to ask no metadata server, which Google's
# machines alone have, is not to miss what that would answer, and may be loaded by several
# processes at once.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
CLASSES, EPOCH = 10, 1000  # classes, and steps an epoch, where the data are not opened


@dataclass(frozen=True)
class Program:
    """A compiled training step, as one chip runs it.

    Attributes:
        phase: Which of the run's, from 1.
        layout: Of batches and state.
        chips: Of the topology; the layout may use fewer.
        hosts: Machines that have them.
        batch: Examples a step, over all chips.
        flops, nbytes: Of a step, as XLA counts them; bytes of all memories.
        memory: Bytes of `arguments`, `results`, those of them in the `place of arguments`,
            `temporaries` and `code`.
        text: Its HLO.
        seconds: That tracing and compiling took.
    """

    phase: int
    layout: Layout
    chips: int
    hosts: int
    batch: int
    flops: float
    nbytes: float
    memory: dict[str, int]
    text: str
    seconds: float


def prepare() -> None:
    """Set the environment so that libtpu only compiles.

    Errors:
        UserError: It is not installed.
    """
    if not (importlib.util.find_spec('libtpu') or os.environ.get('TPU_LIBRARY_PATH')):
        raise UserError(
            f'{sys.executable} has no libtpu, the compiler for TPUs; install it into an '
            'environment of its own: python -m venv .tpu, then .tpu/bin/pip install -r '
            'requirements-tpu.txt -c requirements-lock.txt, and use .tpu/bin/python'
        )
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')  # JAX has read the environment
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology; they can be compiled for and hold nothing.

    Errors:
        UserError: libtpu does not know it.
    """
    from jax.experimental import topologies

    host = [*(min(2, side) for side in topology.sides[:2]), 1]  # four chips, where there are
    try:
        found = topologies.get_topology_desc(
            topology_name=str(topology), platform='tpu', chips_per_host_bounds=host
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
        raise UserError(
            f'--topology={topology}: libtpu knows no such slice ({reason}); take sides that are '
            'powers of two, e.g. v5e:2x4'
        ) from error
    return list(found.devices)


def description(config: cfg.Config, classes: int = 0) -> dict[str, Any]:
    """What `train.setup.describe` says of the data, as far as it shapes the program.

    Where `config.data` says the images' shape, the data need not exist: the number of classes is
    then given or assumed. Else the data are opened. Statistics are placeholders, since their
    values shape nothing.

    Args:
        config: A validated config.
        classes: Number of classes of data that are not opened; 0 assumes 10, or 2 with one output.

    Errors:
        UserError: The data must be opened and cannot be.
    """
    data, model = config.data, config.model
    if data.resize != 'none' and data.size and data.channels:
        shape, count = (data.size, data.size, data.channels), EPOCH * data.batch
        names = [str(k) for k in range(classes or (2 if model.outputs == 1 else CLASSES))]
    else:
        source = open_split(data, 'train')
        shape = image_shape(source, data.resize, data.size, data.channels)
        count, names = len(source), list(source.class_names)
    preprocessing: dict[str, Any] = {'kind': 'caffe'}
    if model.name != 'vgg16' or model.weights == 'random':
        ones, channels = [1.0] * shape[-1], 3 if model.name == 'vgg16' else shape[-1]
        preprocessing = {'kind': 'standardize', 'mean': ones, 'std': ones, 'channels': channels}
    return {
        'train': {'count': count},
        'class_names': names,
        'image_shape': list(shape),
        'preprocessing': preprocessing,
    }


def programs(
    config: cfg.Config,
    described: dict[str, Any],
    devices: list[Any],
    *,
    model: int = 1,
    fsdp: bool = False,
) -> Iterator[Program]:
    """The training step of each phase, compiled for TPUs.

    Args:
        config: A validated config; its batch is that of all chips together.
        described: As `description` gives it.
        devices: As `devices` gives them.
        model, fsdp: As `mesh.make_mesh` takes them.

    Errors:
        UserError: What `mesh.make_mesh` finds wrong.
        RunFailed: The step does not fit into a chip's memory.
    """
    data = config.data
    sizes = data.batch // config.optimizer.accumulate, data.eval_batch or data.batch
    layout = make_mesh(devices, sizes, model=model, fsdp=fsdp)
    task = setup.make_task(config, described)
    with compiling_for('tpu'):
        phases = setup.make_phases(config, task)
        with jax.disable_jit():  # init has compiler options, which inner functions may not have
            state = jax.eval_shape(lambda: phases[0].init(config.seed))
        for number, steps in enumerate(phases, start=1):
            state = jax.eval_shape(steps.enter, state) if number > 1 else state
            start = time.perf_counter()
            train, *_ = jitted(steps, layout, state)
            batch = _batch(config, task, steps, layout)
            lowered = train.lower(
                _laid(state, layout.state_sharding(state)), batch, values_of(config)
            )
            compiled = _compiled(lowered)
            seconds = time.perf_counter() - start
            cost: Any = compiled.cost_analysis()
            yield Program(
                number,
                layout,
                len(devices),
                len({device.process_index for device in devices}),
                config.data.batch,
                cost['flops'],
                cost['bytes accessed'],
                _memory(compiled.memory_analysis()),
                compiled.as_text(),
                seconds,
            )


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        lines = (line.strip() for line in str(error).splitlines())
        used = next((line for line in lines if line.startswith('Used')), 'XLA ran out of memory')
        raise RunFailed(
            f'the step does not fit into a chip: {used} Lower --batch_per_chip, or divide the '
            'state with --fsdp or --model_parallel'
        ) from error


def _laid(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _batch(config: cfg.Config, task: Task, steps: Steps, layout: Layout) -> Any:
    """The shapes of a batch; of features where the phase trains on them."""
    size = config.data.batch
    image = jax.ShapeDtypeStruct((size, *task.image_shape), jnp.uint8)
    if steps.cached:
        net = build(config.model, task.num_classes)

        def features(parameters, images) -> Any:
            x = task.prepare(images)
            return net.apply({'params': parameters}, x, train=False, method='features')

        made = jax.eval_shape(features, steps.shapes, image)
        image = jax.ShapeDtypeStruct(made.shape, config.features.dtype)
    batch = {
        'image': image,
        'label': jax.ShapeDtypeStruct((size,), jnp.int32),
        'index': jax.ShapeDtypeStruct((size,), jnp.int32),
        'mask': jax.ShapeDtypeStruct((size,), jnp.bool_),
    }
    return _laid(batch, dict.fromkeys(batch, layout.batch))


def _memory(sizes: Any) -> dict[str, int]:
    return {
        'arguments': sizes.argument_size_in_bytes,
        'results': sizes.output_size_in_bytes,
        'place of arguments': sizes.alias_size_in_bytes,
        'temporaries': sizes.temp_size_in_bytes,
        'code': sizes.generated_code_size_in_bytes,
    }
