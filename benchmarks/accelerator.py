"""This project on a GPU or TPU: a training step, and VGG16's features, in both precisions.

  python -m benchmarks.accelerator --out=benchmarks/RESULTS.md
  python -m benchmarks.accelerator --workloads=small28 --batches=64,1024 --together=16

Steps of 96 px and of 28 px images and the frozen convolutions at 224 px, for every batch size in
float32 and bfloat16, against Flax in the same process and with the same runtime settings; then
several runs of a step as one program.
Everything lives in arrays: neither TFDS nor Grain is needed. It runs on a CPU, too, for a look.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import cli, flax_peer, ours, results, workloads
from benchmarks.problem import Problem
from cnn_jax import runtime
from cnn_jax.ablation.training import compile_structure
from cnn_jax.models import build
from cnn_jax.pretrained.weights import load
from cnn_jax.summary import layers
from cnn_jax.tools.profile import measure_peak
from cnn_jax.train import setup
from cnn_jax.train.program import traced_values

DTYPES = 'float32', 'bfloat16'
FEATURES = 'features'
WARM, STEPS, ROUNDS = 3, 10, 5
COLUMNS = 'workload', 'type', 'batch', 'contender', 'images/s', 'of Flax', 'of peak'


def main() -> None:
    """Measure all, and print and keep the table."""
    parser = argparse.ArgumentParser(
        'python -m benchmarks.accelerator',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = [*workloads.STEPS, FEATURES]
    parser.add_argument('--workloads', default=','.join(every), help=f'of {", ".join(every)}')
    parser.add_argument('--batches', default='32,256', help='examples a step (32,256)')
    parser.add_argument('--together', type=int, default=16, help='runs in one program (16)')
    parser.add_argument('--out', type=Path, help='results file whose section is replaced')
    given = parser.parse_args()
    batches = [int(word) for word in cli.words(given.batches)]
    runtime.configure()
    peaks = {dtype: measure_peak(dtype) for dtype in DTYPES}
    rows = []
    for workload in cli.words(given.workloads):
        for batch in batches:
            for dtype in DTYPES:
                rows += compared(workload, batch, dtype, peaks[dtype], given.together)
    device = jax.devices()[0].device_kind
    told = ', '.join(f'{peak / 1e12:.1f} in {dtype}' for dtype, peak in peaks.items())
    cli.publish(
        f'On {device}',
        f"""{results.conditions('jax', 'jaxlib', 'flax')}; {device}

Median [quartiles] of {ROUNDS} interleaved rounds in one process; ratios are of times, taken within
a round. Of peak: model FLOP/s over those of a large matrix product of the same type, which are
({told}) TFLOP/s.

{results.table(COLUMNS, rows)}
""",
        given.out,
    )


def compared(
    workload: str, batch: int, dtype: str, peak: float, together: int
) -> Iterator[list[str]]:
    """The table's rows of one workload in one type at one batch size."""
    if workload == FEATURES:
        made = workloads.features_problem(batch, load('auto'))
        starts = {'cnn_jax': ours.features, 'Flax': flax_peer.features}
    else:
        made = workloads.step_problem(workload, batch)
        starts = {'cnn_jax': ours.start, 'Flax': flax_peer.start}
    made.config['model']['dtype'] = dtype
    runs = {name: (start(made).run, 1) for name, start in starts.items()}
    if workload != FEATURES:
        runs[f'cnn_jax, {together} runs together'] = runs_together(made, together), together
    flops = forward_flops(made) if workload == FEATURES else workloads.training_flops(made)
    seconds = interleaved({name: run for name, (run, _) in runs.items()})
    for name, (_, models) in runs.items():
        each = np.array(seconds[name]) / models
        yield [
            workload,
            dtype,
            str(batch),
            name,
            results.quartiles(batch / each, digits=0),
            results.quartiles(each / np.array(seconds['Flax']), digits=2),
            f'{flops / np.median(each) / peak:.0%}',
        ]


def interleaved(runs: dict[str, Callable[[int], None]]) -> dict[str, list[float]]:
    """Seconds of a call of each, one figure a round."""
    for run in runs.values():
        run(WARM)
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            run(STEPS)
            seconds[name].append((time.perf_counter() - began) / STEPS)
    return seconds


def runs_together(made: Problem, count: int) -> Callable[[int], None]:
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

    return run


def forward_flops(made: Problem) -> int:
    """Multiplications and additions of the backbone's convolutions on one batch."""
    config, shape = ours.config_of(made), made.images.shape
    rows = layers(build(config.model, made.classes), tuple(shape[2:]))
    return shape[1] * sum(row.flops for row in rows if row.path.startswith('backbone/'))


if __name__ == '__main__':
    cli.run(main)
