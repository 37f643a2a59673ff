"""A training step against stock Flax, each with and without the runtime settings.

  python -m benchmarks.step --workload=strided96 --rounds=20 --out=benchmarks/RESULTS.md

The same network, weights, optimizer, batches and dtype, dropout and batch normalization on. Each
contender lives in a process of its own; in every round each runs its steps in turn.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import gate, gemm, problem, results, workloads
from benchmarks.process import rotated
from benchmarks.worker import Worker

# Name: its module, and whether it runs with the runtime settings. The last is the reference.
CONTENDERS = {
    'cnn_jax, runtime settings': ('benchmarks.ours', True),
    'cnn_jax without settings': ('benchmarks.ours', False),
    'stock Flax, runtime settings': ('benchmarks.stock_flax', True),
    'stock Flax': ('benchmarks.stock_flax', False),
}
REFERENCE = 'stock Flax'
PEAK = 'matrix product'
GATE_STEPS = 20
WARM_STEPS = 2  # not timed: another process has had the caches
TURN_SECONDS = 1.0


def main() -> None:
    """Measure one workload."""
    parser = argparse.ArgumentParser('benchmarks.step', description=__doc__)
    parser.add_argument('--workload', choices=workloads.STEPS, default='strided96')
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--batch', type=int, default=0, help="0: the experiment's own")
    parser.add_argument('--out', type=Path, help='results file whose section is replaced')
    arguments = parser.parse_args()
    body = measure(arguments.workload, arguments.rounds, arguments.batch)
    print(body)
    if arguments.out:
        results.write_section(arguments.out, f'Training step: {arguments.workload}', body)


def measure(workload: str, rounds: int, batch: int = 0) -> str:
    """The table of a workload, as Markdown.

    Args:
        workload: In `workloads.STEPS`.
        rounds: How often each contender has its turn.
        batch: Examples a step; 0 is the experiment's own number.

    Errors:
        gate.Disagreement: The contenders' losses differ.
    """
    made = workloads.step_problem(workload, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'problem.npz'
        problem.write(made, path)
        workers = {}
        try:
            for name, (module, settings) in (
                CONTENDERS | {PEAK: ('benchmarks.gemm', True)}
            ).items():
                # Of its own, so that every first step is a cold one.
                cache = {'CNN_JAX_CACHE': str(Path(folder) / str(len(workers)))}
                workers[name] = Worker(module, path, settings=settings, environment=cache)
            losses = {name: workers[name].ask(losses=GATE_STEPS)['losses'] for name in CONTENDERS}
            difference = gate.check(losses)
            seconds = interleave(workers, rounds)
        finally:
            memory = {name: worker.close() for name, worker in workers.items()}
    flops = workloads.training_flops(made)
    peak = gemm.FLOPS / min(seconds[PEAK])
    rows = [
        [
            name,
            results.quartiles([1e3 * each for each in seconds[name]]),
            results.quartiles(ratios(seconds[name], seconds[REFERENCE]), digits=2),
            f'{flops / np.median(seconds[name]) / peak:.0%}',
            f'{workers[name].first_step:.1f}',
            f'{memory[name] / 1e6:,.0f}',
        ]
        for name in CONTENDERS
    ]
    columns = (
        'contender',
        'ms a step',
        'of stock Flax',
        'of GEMM peak',
        'first step, s',
        'peak MB',
    )
    _, size, *shape = made.images.shape
    return f"""{results.conditions('jax', 'jaxlib', 'flax', 'optax')}

{'×'.join(map(str, shape))}, batch {size}, float32, Adam; {flops / 1e9:.2f} GFLOP a step.
Median [quartiles] of {rounds} interleaved rounds; ratios are taken within a round.
GEMM peak: {peak / 1e9:.0f} GFLOP/s, the best of a {gemm.SIZE}² float32 product in the same rounds.
First step: from the process's start, with nothing compiled before.
The losses of the first {GATE_STEPS} steps without dropout agree within {difference:.0e}, relative.

{results.table(columns, rows)}
"""


def ratios(seconds: list[float], reference: list[float]) -> list[float]:
    """Of two contenders, round by round."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]


def interleave(workers: dict[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of every worker, one figure a round; the order rotates."""
    counts = {}
    for name, worker in workers.items():
        once = worker.ask(run=WARM_STEPS)['seconds'] / WARM_STEPS
        counts[name] = max(3, round(TURN_SECONDS / once))
    seconds = {name: [] for name in workers}
    for number in range(rounds):
        for name in rotated(workers, number):
            workers[name].ask(run=WARM_STEPS)
            taken = workers[name].ask(run=counts[name])['seconds']
            seconds[name].append(taken / counts[name])
        print(f'round {number + 1} of {rounds}', file=sys.stderr)
    return seconds


if __name__ == '__main__':
    try:
        main()
    except gate.Disagreement as error:
        sys.exit(f'failed: {error}')
