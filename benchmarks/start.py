"""From the start of the process to the end of the first training step of the small net.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.start --rounds=5 --out=benchmarks/RESULTS.md

Each contender is started twice in every round: cold, with nothing compiled before, and warm, with
what the first start has left. This project keeps what it compiles by itself; for Flax and Keras the
two variables are set that make JAX keep it.

The log of launch.train does not tell when its first step ended, so the step is that of
`benchmarks.step`; launch.train itself is timed to its end, with one step, an evaluation and a
checkpoint.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import cli, contest, problem, results, workloads
from benchmarks.contest import Entrant, chosen, rotated, timed
from benchmarks.step import OURS, PEERS

LAUNCHER = 'cnn_jax, launch.train to its end'
ENTRANTS = {'cnn_jax': OURS['cnn_jax'], LAUNCHER: Entrant('launch.train'), **PEERS}


def main() -> None:
    """Measure."""
    given = cli.parser('benchmarks.start', __doc__, rounds=5).parse_args()
    body = measure(given.rounds, given.peers, cli.words(given.contenders))
    cli.publish('Start to the first step', body, given.out)


def measure(rounds: int, peers: Path, words: list[str]) -> str:
    """The table, as Markdown.

    Args:
        rounds: How often each contender has its two starts.
        peers: The folder of the peers' environments.
        words: Of the contenders' names; none for all.
    """
    entrants, left_out = chosen(ENTRANTS, words, peers)
    seconds = {kind: {name: [] for name in entrants} for kind in ('cold', 'warm')}
    versions = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        problem.write(workloads.step_problem('small28'), folder / 'problem.npz')
        for number in range(rounds):
            for name in rotated(entrants, number):
                shutil.rmtree(folder / 'cache', ignore_errors=True)
                for kind in seconds:
                    taken, version = start(entrants[name], folder, peers)
                    seconds[kind][name].append(taken)
                    print(f'{name}, {kind}: {taken:.1f} s', file=sys.stderr)
                versions.append(version)
    among = [name for name in entrants if name in PEERS] or [*entrants]
    best = {kind: contest.best(each, among) for kind, each in seconds.items()}
    rows = [
        [name, *(cell for kind in seconds for cell in cells(seconds[kind], name, best[kind]))]
        for name in entrants
    ]
    columns = ('contender', 'cold, s', results.OF_BEST, 'warm, s', results.OF_BEST)
    return f"""{results.conditions('jaxlib')}, {', '.join(v for v in dict.fromkeys(versions) if v)}

28×28×1, batch 64, float32, Adam; from the process's start to the end of its first training step.
Median [quartiles] of {rounds} interleaved rounds; ratios are taken within a round.
Cold: nothing compiled before; the best peer is {best['cold']}.
Warm: the start after that, compilations kept where there is a way; the best is {best['warm']}.
The launcher's row holds its evaluation and its checkpoint, too.
{results.left_out(left_out)}
{results.table(columns, rows)}
"""


def cells(seconds: dict[str, list[float]], name: str, reference: str) -> tuple[str, str]:
    """A contender's seconds, and their ratio to the reference's."""
    ratios = contest.ratios(seconds[name], seconds[reference])
    return results.quartiles(seconds[name]), results.quartiles(ratios, digits=2)


def start(entrant: Entrant, folder: Path, peers: Path) -> tuple[float, str]:
    """Seconds to the end of the first step, and the version; the cache is in the folder."""
    cache = folder / 'cache'
    if entrant.module == 'launch.train':
        shutil.rmtree(folder / 'work', ignore_errors=True)
        command = [
            *(sys.executable, '-m', 'launch.train', f'--workdir={folder / "work"}'),
            *('--config=experiments/small.py', '--config.train.epochs=0.01'),
        ]
        return timed(command, {'CNN_JAX_CACHE': str(cache)})[0], ''
    keep = {
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    worker = entrant.worker(
        folder / 'problem.npz', peers, cache, environment={} if entrant.settings else keep
    )
    worker.close()
    return worker.first_step, worker.version


if __name__ == '__main__':
    cli.run(main)
