"""A training step of this project and of its peers.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.step --workload=strided96 --rounds=10 --out=benchmarks/RESULTS.md
  python -m benchmarks.step --workload=small28 --contenders=cnn_jax,PyTorch

The same network, weights, optimizer, batches and dtype, dropout and batch normalization on. Each
contender lives in a process of its own, with all cores; in every round each runs its steps in
turn. First the losses of all must agree.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import cli, contest, ours, problem, results, workloads
from benchmarks.contest import Entrant, chosen, keras_on

# Flax with this project's settings shows what these are worth; nobody has it so.
OURS = {
    'cnn_jax': Entrant('benchmarks.ours', settings=True),
    'cnn_jax without runtime settings': Entrant('benchmarks.ours'),
    'Flax with our runtime settings': Entrant('benchmarks.flax_peer', settings=True),
}
PEERS = {
    'Flax': Entrant('benchmarks.flax_peer'),
    'Keras on JAX': keras_on('jax', 'benchmarks.keras_peer'),
    'Keras on TensorFlow': keras_on('tensorflow', 'benchmarks.keras_peer'),
    'Keras on PyTorch': keras_on('torch', 'benchmarks.keras_peer'),
    'PyTorch': Entrant('benchmarks.torch_peer', 'pytorch'),
    'PyTorch, channels_last': Entrant('benchmarks.torch_peer:channels_last', 'pytorch'),
    'PyTorch, torch.compile': Entrant('benchmarks.torch_peer:compiled', 'pytorch', compiler=True),
}
PEAK = 'matrix product'
YARDSTICK = Entrant('benchmarks.ours:matmul', settings=True)
GATE_STEPS = 20
TOLERANCE = 1e-4  # half more of the learning rate is 4e-4 off, a tenth more of L2 6e-3


def main() -> None:
    """Measure one workload."""
    parser = cli.parser('benchmarks.step', __doc__, rounds=10)
    parser.add_argument('--workload', choices=workloads.STEPS, default='strided96')
    parser.add_argument('--batch', type=int, default=0, help="0: the experiment's own")
    given = parser.parse_args()
    body = measure(
        given.workload, given.rounds, given.peers, cli.words(given.contenders), given.batch
    )
    cli.publish(f'Training step: {given.workload}', body, given.out)


def measure(workload: str, rounds: int, peers: Path, words: list[str], batch: int = 0) -> str:
    """The table of a workload, as Markdown.

    Args:
        workload: In `workloads.STEPS`.
        rounds: How often each contender has its turn.
        peers: The folder of the peers' environments.
        words: Of the contenders' names; none for all.
        batch: Examples a step; 0 is the experiment's own number.

    Errors:
        contest.Disagreement: The contenders' losses differ.
    """
    made = workloads.step_problem(workload, batch)
    entrants, left_out = chosen(OURS | PEERS, words, peers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'problem.npz'
        problem.write(made, path)
        found = contest.measure(
            entrants | {PEAK: YARDSTICK},
            path,
            peers,
            rounds=rounds,
            numbers=GATE_STEPS,
            check=functools.partial(contest.check, tolerance=TOLERANCE),
        )
    flops = workloads.training_flops(made)
    peak = ours.FLOPS / min(found.seconds[PEAK])
    reference = contest.best(found.seconds, [n for n in entrants if n in PEERS] or [*entrants])
    rows = [
        [
            name,
            results.quartiles([1e3 * each for each in found.seconds[name]]),
            results.quartiles(
                contest.ratios(found.seconds[name], found.seconds[reference]), digits=2
            ),
            f'{flops / np.median(found.seconds[name]) / peak:.0%}',
            f'{found.first_step[name]:.1f}',
            f'{found.peak[name]:,.0f}',
        ]
        for name in entrants
    ]
    columns = (
        'contender',
        'ms a step',
        results.OF_BEST,
        'of GEMM peak',
        'first step, s',
        'peak MB',
    )
    _, size, *shape = made.images.shape
    return f"""{results.conditions('jaxlib', 'optax')}, {', '.join(found.versions)}

{'×'.join(map(str, shape))}, batch {size}, float32, Adam; {flops / 1e9:.2f} GFLOP a step.
Median [quartiles] of {rounds} interleaved rounds. {results.of_best(reference)}
GEMM peak: {peak / 1e9:.0f} GFLOP/s, the best of a {ours.SIZE}² float32 product in the same rounds.
First step: from the process's start, with nothing compiled before.
The losses of the first {GATE_STEPS} steps without dropout agree within {found.checked:.0e} of their
mean.
{results.left_out(left_out)}
{results.table(columns, rows)}
"""


if __name__ == '__main__':
    cli.run(main)
