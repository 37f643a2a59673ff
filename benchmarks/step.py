"""A training step of this project and of its peers.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.step --workload=strided96 --rounds=10 --out=benchmarks/RESULTS.md
  python -m benchmarks.step --workload=small28 --contenders=cnn_jax,PyTorch
  python -m benchmarks.step --workload=small28 --cores=1    # as an ablation's workers are pinned

The same network, weights, optimizer, batches and dtype, dropout and batch normalization on. Each
contender lives in a process of its own, with all cores or `--cores`; in every round each runs its
steps in turn. First the losses of all must agree.
"""

import functools
import os

import numpy as np

from benchmarks import cli, contest, ours, results, workloads
from benchmarks.contest import Entrant, keras_on

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
COLUMNS = 'contender', 'ms a step', results.OF_BEST, 'of GEMM peak', 'first step, s', 'peak MB'
GATE_STEPS = 20
TOLERANCE = 1e-4  # half more of the learning rate is 4e-4 off, a tenth more of L2 6e-3


def main() -> None:
    """Measure one workload."""
    parser = cli.parser('benchmarks.step', __doc__, rounds=10)
    parser.add_argument('--workload', choices=workloads.STEPS, default='strided96')
    parser.add_argument('--batch', type=int, default=0, help="0: the experiment's own")
    parser.add_argument('--cores', type=int, default=0, help='to keep all contenders to (0: all)')
    given = parser.parse_args()
    if given.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    made = workloads.step_problem(given.workload, given.batch)
    entrants, left_out = contest.chosen(OURS | PEERS, given.contenders, given.peers)
    found = contest.measure(
        entrants | {PEAK: YARDSTICK},
        made,
        given.peers,
        rounds=given.rounds,
        numbers=GATE_STEPS,
        check=functools.partial(contest.check, tolerance=TOLERANCE),
    )
    flops = workloads.training_flops(made)
    peak = ours.FLOPS / min(found.seconds.pop(PEAK))
    reference = contest.best(found.seconds, PEERS)
    rows = [
        [
            name,
            results.quartiles([1e3 * each for each in seconds]),
            contest.ratio(seconds, found.seconds[reference]),
            f'{flops / np.median(seconds) / peak:.0%}',
            *found.costs(name),
        ]
        for name, seconds in found.seconds.items()
    ]
    _, size, *shape = made.images.shape
    body = f"""{results.conditions('jaxlib', 'optax')}, {', '.join(found.versions)}

{'×'.join(map(str, shape))}, batch {size}, float32, Adam; {flops / 1e9:.2f} GFLOP a step.
Median [quartiles] of {given.rounds} interleaved rounds. {results.of_best(reference)}
GEMM peak: {peak / 1e9:.0f} GFLOP/s, the best of a {ours.SIZE}² float32 product in the same rounds.
First step: from the process's start, with nothing compiled before but the native library.
The losses of the first {GATE_STEPS} steps without dropout agree within {found.checked:.0e} of their
mean.
{results.left_out(left_out)}
{results.table(COLUMNS, rows)}
"""
    kept_to = f', {given.cores} core{"s" * (given.cores > 1)}' if given.cores else ''
    cli.publish(f'Training step: {given.workload}{kept_to}', body, given.out)


if __name__ == '__main__':
    cli.run(main)
