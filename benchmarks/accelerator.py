"""This project on a GPU or TPU, alone and against Flax and PyTorch, within ten minutes.

  python -m benchmarks.accelerator --out=benchmarks/RESULTS.md
  python -m benchmarks.accelerator --workloads=small28 --batches=64,1024 --together=1,16 --minutes=5

Training steps of 96 px and of 28 px images and of a head on VGG16's frozen convolutions, and these
convolutions alone, in float32 and bfloat16, as a run has them and without deterministic kernels;
several runs as one program; and the kernels of a step. Each part is a process of its own, and each
row is printed and kept when it is measured: what fails or takes too long costs no other. Images and
weights are drawn at random, so that no download is needed. PyTorch takes part where it is
installed. It runs on a CPU, too, for a look.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from benchmarks import cli, flax_peer, ours, results, workloads
from benchmarks.problem import Problem
from cnn_jax import params, runtime
from cnn_jax.ablation.training import compile_structure
from cnn_jax.errors import UserError
from cnn_jax.models import build
from cnn_jax.summary import layers
from cnn_jax.tools.profile import measure_peak, operations, training_flops
from cnn_jax.train import setup
from cnn_jax.train.program import traced_values
from experiments import finetune_vgg16

DTYPES = 'float32', 'bfloat16'
FEATURES, HEAD = 'vgg16 features', 'vgg16 head'
WORKLOADS = *workloads.STEPS, HEAD, FEATURES
SECONDS, ROUNDS = 0.2, 5  # of each contender in a round
COLUMNS = 'part', 'workload', 'type', 'batch', 'contender', 'images/s', 'of the first', 'TFLOP/s'
OF_PROFILE = 'kernel', 'ms a step', 'a step'
COUNTS = 1, 2, 4, 8, 16, 32  # runs in one program
PARTS = 'as run', 'any order', 'PyTorch', 'profile', 'together'
TRACED, KERNELS = 5, 15  # steps, and rows of the profile

Row = dict[str, str]  # the columns of a table, or a note


def main() -> None:
    """Measure all parts that there is time for, and print and keep what is measured."""
    parser = cli.parser('benchmarks.accelerator', __doc__)
    add = parser.add_argument
    add('--workloads', type=cli.words, default=WORKLOADS, help=f'of {", ".join(WORKLOADS)}')
    add('--batches', type=cli.words, default=['256'], help='examples a step (256)')
    add('--together', type=cli.words, default=[*map(str, COUNTS)], help='runs in one program')
    add('--minutes', type=float, default=10.0, help='after which nothing more is measured (10)')
    add('--parts', type=cli.words, default=PARTS, help=f'of {", ".join(PARTS)}')
    add('--measure', choices=PARTS, help=argparse.SUPPRESS)  # in this process: one row a line
    given = parser.parse_args()
    if given.measure:
        for row in measured(given.measure, given):
            print(json.dumps(row), flush=True)
        return
    for word in (*given.workloads, *given.parts):
        if word not in (*WORKLOADS, *PARTS):
            raise UserError(f'there is no {word}; --help lists the workloads and the parts')
    end, rows = time.monotonic() + 60 * given.minutes, []
    for part in given.parts:
        for row in in_a_process(part, end - time.monotonic()):
            print(*row.values(), sep=' · ', flush=True)
            rows.append(row)
            if given.out:
                results.write_section(given.out, 'On an accelerator', report(rows))
    print(report(rows))


def in_a_process(part: str, seconds: float) -> Iterator[Row]:
    """Yield the rows of a part, measured in a process of its own."""
    environment = os.environ | {'TORCHINDUCTOR_FREEZING': '1'}
    if part == 'any order':
        flags = os.environ.get('XLA_FLAGS', '')
        environment['XLA_FLAGS'] = f'{flags} --xla_gpu_deterministic_ops=false'.strip()
    if part == 'PyTorch':  # whose memory JAX would take
        environment['JAX_PLATFORMS'] = 'cpu'
    command = [sys.executable, '-m', 'benchmarks.accelerator', *sys.argv[1:], f'--measure={part}']
    with tempfile.TemporaryFile('w+') as errors:
        pipes = {'stdout': subprocess.PIPE, 'stderr': errors, 'text': True}
        child = subprocess.Popen(command, env=environment, **pipes)
        timer = threading.Timer(max(seconds, 0), child.kill)
        timer.start()
        for line in child.stdout or ():
            if line.startswith('{'):
                yield {'part': part, **json.loads(line)}
        code = child.wait()
        timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ['no message'])[-1]
    if code < 0:
        yield {'note': f'{part}: the time was over.'}
    elif code:
        yield {'note': f'{part} failed: {last}'}


def report(rows: list[Row]) -> str:
    """The section: conditions, the tables, and what is missing."""
    notes = '\n'.join(f'- {row["note"]}' for row in rows if 'note' in row)
    tables = []
    for columns in (COLUMNS, OF_PROFILE):
        if cells := [[row[name] for name in columns] for row in rows if columns[-1] in row]:
            tables.append(f'{results.table(columns, cells)}\n')
    return f"""{results.conditions('jax', 'jaxlib', 'flax')}

Median [quartiles] of {ROUNDS} rounds, in which the contenders of a workload take turns; ratios are
of times, taken within a round, to the first of them. `as run`: as a training run is compiled;
`any order`: with kernels that may add up in any order. PyTorch runs in a process of its own after
the others: compare images a second; its ratios are to its own first row.

{chr(10).join([*tables, notes])}
"""


def measured(part: str, given: argparse.Namespace) -> Iterator[Row]:
    """Measure a part in this process; `any order` means something on NVIDIA's GPUs alone."""
    if part == 'PyTorch' and not importlib.util.find_spec('torch'):
        yield {'note': 'PyTorch is not installed.'}
        return
    settings = runtime.configure()
    if part == 'as run':
        peaks = ', '.join(f'{measure_peak(dtype) / 1e12:.3g} in {dtype}' for dtype in DTYPES)
        yield {'note': f'{runtime.devices()}; {settings}.'}
        yield {'note': f'TFLOP/s of a large matrix product: {peaks}.'}
    if part == 'any order' and 'gpu' not in jax.default_backend():
        return
    for made, dtype, name in problems(given):
        if part == 'profile':
            yield from profile(made, dtype, name)
            return
        yield from compared(name, made, dtype, contenders(part, name, given.together))


def contenders(
    part: str, name: str, together: list[str]
) -> dict[str, tuple[Callable[..., Any], int]]:
    """What makes each contender, and the number of models that it trains."""
    counts = map(int, together)
    if part == 'together':
        many = {f'{n} together': (functools.partial(runs_together, count=n), n) for n in counts}
        return many if name in workloads.STEPS else {}
    if part == 'PyTorch':
        from benchmarks import torch_peer

        peers = {
            HEAD: {},
            FEATURES: {
                'channels last': torch_peer.features_channels_last,
                'compiled': torch_peer.features_compiled,
            },
        }
        step = {'channels last': torch_peer.channels_last, 'compiled': torch_peer.compiled}
    else:
        peers = {
            HEAD: {'cnn_jax': ours.start},  # the peer has no such net
            FEATURES: {'cnn_jax': ours.features, 'Flax': flax_peer.features},
        }
        step = {'cnn_jax': ours.start, 'Flax': flax_peer.start}
    return {each: (start, 1) for each, start in peers.get(name, step).items()}


def profile(made: Problem, dtype: str, name: str) -> Iterator[Row]:
    """The kernels of some steps, by the time that they take."""
    step = ours.start(made)
    step.run(3)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step.run(TRACED)
        (session,) = Path(folder).glob('plugins/profile/*')
        spent: dict[str, float] = collections.defaultdict(float)
        count = collections.Counter()
        for start, end, kernel in operations(session):
            kind = re.sub(r'[.\d]+$', '', kernel)
            spent[kind] += end - start
            count[kind] += 1
    yield {'note': f'profile of {name} in {dtype}: {count.total() / TRACED:.0f} kernels a step.'}
    for kind, seconds in sorted(spent.items(), key=lambda each: -each[1])[:KERNELS]:
        cells = kind, f'{seconds / TRACED * 1e3:.3f}', f'{count[kind] / TRACED:.0f}'
        yield dict(zip(OF_PROFILE, cells))


def problems(given: argparse.Namespace) -> Iterator[tuple[Problem, str, str]]:
    """Every workload with its type and name."""
    for batch, name, dtype in itertools.product(given.batches, given.workloads, DTYPES):
        step = workloads.step_problem if name in workloads.STEPS else vgg16_problem
        made = step(name, int(batch))
        made.config['model']['dtype'] = dtype
        yield made, dtype, name


def vgg16_problem(name: str, batch: int) -> Problem:
    """Random images for VGG16 with random weights, whose convolutions are frozen."""
    config = finetune_vgg16.get_config()
    config.data.batch = batch
    config.features.cache = 'never'
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, batch, 224, 224, 3), np.uint8)
    labels = rng.integers(0, 2, images.shape[:2], np.int32)
    return workloads.problem(config, {'kind': 'caffe'}, images, labels, 2)


def compared(
    name: str, made: Problem, dtype: str, starts: dict[str, tuple[Callable[..., Any], int]]
) -> Iterator[Row]:
    """Start the contenders (what makes each, its models), time them in turns, yield a row each."""
    batch, runs = made.images.shape[1], {}
    for contender, (start, models) in starts.items():
        try:
            run = start(made).run
            run(1)
            began = time.perf_counter()
            run(1)
            once = time.perf_counter() - began
            runs[contender] = run, max(1, min(1000, round(SECONDS / once))), models
        except Exception as error:  # such as too little memory: the others go on
            told = f'{name} in {dtype}, {contender}: {type(error).__name__}: {error}'
            yield {'note': told.splitlines()[0]}
    seconds: dict[str, list[float]] = {contender: [] for contender in runs}
    for _ in range(ROUNDS):
        for contender, (run, steps, models) in runs.items():
            began = time.perf_counter()
            run(steps)
            seconds[contender].append((time.perf_counter() - began) / steps / models)
    for contender, times in seconds.items():
        each, first = np.array(times), np.array(next(iter(seconds.values())))
        cells = [
            name,
            dtype,
            str(batch),
            contender,
            results.quartiles((batch / each).tolist()),
            results.quartiles((each / first).tolist(), digits=2),
            f'{batch * flops(name, made) / float(np.median(each)) / 1e12:.3g}',
        ]
        yield dict(zip(COLUMNS[1:], cells))


def flops(name: str, made: Problem) -> int:
    """Multiplications and additions of the matrix products for one image."""
    config, shape = ours.config_of(made), made.images.shape
    rows = layers(build(config.model, made.classes), tuple(shape[2:]))
    if name == FEATURES:
        return sum(row.flops for row in rows if row.path.startswith('backbone/'))
    return training_flops(rows, params.trainable(made.weights, config.train.frozen))


def runs_together(made: Problem, count: int) -> SimpleNamespace:
    """Steps of several runs of different seeds as one program, as `launch.ablate` makes it."""
    config = ours.config_of(made)
    description = {
        'train': {'count': len(made.images) * config.data.batch},
        'class_names': list(map(str, range(made.classes))),
        'image_shape': list(made.images.shape[2:]),
        'preprocessing': made.preprocessing,
    }
    compiled = compile_structure(config, setup.Data(None, None, description, None), count)
    (phase,) = compiled.phases
    seeds = [dataclasses.replace(config, seed=seed) for seed in range(compiled.together)]
    state = compiled.stack([compiled.init(each.seed) for each in seeds])
    values = compiled.stack([traced_values(each) for each in seeds])
    batch = compiled.stack([ours.batches_of(made)[0]] * len(seeds))

    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state, _ = phase.train_step(state, batch, values)
        jax.block_until_ready(state)

    return SimpleNamespace(run=run)


if __name__ == '__main__':
    cli.run(main)
