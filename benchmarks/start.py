"""From the start of the process to the end of the first training step of the small net.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.start --rounds=5 --out=benchmarks/RESULTS.md

Each contender is started twice in every round: cold, with nothing compiled before but the native
library, and warm, with what the first start has left. This project keeps what it compiles by
itself; for Flax and Keras the two variables are set that make JAX keep it.

The log of launch.train does not tell when its first step ended, so the step is that of
`benchmarks.step`; launch.train itself is timed to its end, with one step, an evaluation and a
checkpoint.
"""

import shutil
import sys
from pathlib import Path

from benchmarks import cli, contest, results, workloads
from benchmarks.contest import Entrant
from benchmarks.step import OURS, PEERS

LAUNCHER = 'cnn_jax, launch.train to its end'
ENTRANTS = {'cnn_jax': OURS['cnn_jax'], LAUNCHER: Entrant('launch.train'), **PEERS}


def main() -> None:
    """Measure."""
    given = cli.parser('benchmarks.start', __doc__, rounds=5).parse_args()
    entrants, left_out = contest.chosen(ENTRANTS, given.contenders, given.peers)
    versions = {}
    with contest.written(workloads.step_problem('small28')) as path:

        def turn(name: str) -> tuple[float, float]:
            contest.cold_cache(path.with_name('cache'))
            (cold, _), (warm, versions[name]) = (
                start(entrants[name], path, given.peers) for _ in range(2)
            )
            return cold, warm

        taken = contest.take_turns(entrants, given.rounds, turn)
    kinds = [{name: [each[k] for each in pairs] for name, pairs in taken.items()} for k in (0, 1)]
    best = [contest.best(seconds, PEERS) for seconds in kinds]
    rows = [[name] for name in entrants]
    for seconds, reference in zip(kinds, best):
        for row in rows:
            own = seconds[row[0]]
            row += [results.quartiles(own), contest.ratio(own, seconds[reference])]
    columns = ('contender', 'cold, s', results.OF_BEST, 'warm, s', results.OF_BEST)
    named = ', '.join(version for version in dict.fromkeys(versions.values()) if version)
    body = f"""{results.conditions('jaxlib')}, {named}

28×28×1, batch 64, float32, Adam; from the process's start to the end of its first training step.
Median [quartiles] of {given.rounds} interleaved rounds; ratios are taken within a round.
Cold: nothing compiled before but the native library; the best peer is {best[0]}.
Warm: the start after that, compilations kept where there is a way; the best is {best[1]}.
The launcher's row holds its evaluation and its checkpoint, too.
{results.left_out(left_out)}
{results.table(columns, rows)}
"""
    cli.publish('Start to the first step', body, given.out)


def start(entrant: Entrant, made: Path, peers: Path) -> tuple[float, str]:
    """Seconds to the end of the first step, and the version; the cache is beside the problem."""
    cache, work = made.with_name('cache'), made.with_name('work')
    if entrant.module == 'launch.train':
        shutil.rmtree(work, ignore_errors=True)
        command = [
            *(sys.executable, '-m', 'launch.train', f'--workdir={work}'),
            *('--config=experiments/small.py', '--config.train.epochs=0.01'),
        ]
        return contest.timed(command, {'CNN_JAX_CACHE': str(cache)})[0], ''
    keep = {
        'JAX_COMPILATION_CACHE_DIR': str(cache / 'compiled by JAX'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    worker = entrant.worker(made, peers, cache, environment={} if entrant.settings else keep)
    worker.close()
    return worker.first_step, worker.version


if __name__ == '__main__':
    cli.run(main)
