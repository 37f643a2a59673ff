"""A whole ablation, `experiments/regularization.py`, against one script a run.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.ablation --rounds=1 --out=benchmarks/RESULTS.md

This project runs `launch.ablate`, report included. A peer's user starts a script for each arm and
seed, as many at a time as there are cores. Contenders take turns in every round.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks import cli, contest, problem, results, workloads
from benchmarks.contest import interpreter, pooled, rotated, timed
from benchmarks.worker import Worker
from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.data.batches import open_batches
from cnn_jax.runtime import cores
from cnn_jax.train import setup
from experiments.regularization import ARMS, get_config

OURS = 'cnn_jax'
CACHED = ', compile cache'  # of those that are timed with a full one

# What the peers' scripts take from a config.
OPTIONS = (
    'data.batch',
    'optimizer.learning_rate',
    'model.dropout',
    'model.head_dropout',
    'model.norm',
    'model.head_norm',
    'model.norm_momentum',
    'loss.l2',
)

Outcome = tuple[float, dict[str, float]]  # seconds, mean test accuracy of each arm


@dataclass(frozen=True)
class Peer:
    """How a peer's script is run.

    Attributes:
        module: The script.
        home: Its environment in the peers' folder; '' is this project's.
        environment: Variables that its user sets.
        cached: Whether JAX keeps what it compiles; timed with a full cache.
    """

    module: str
    home: str = ''
    environment: dict[str, str] = field(default_factory=dict)
    cached: bool = False

    def command(self, peers: Path) -> list[str]:
        """The command but for its options."""
        return [interpreter(peers, self.home), '-m', f'benchmarks.{self.module}']


def xla_flags() -> str:
    """What `runtime.configure` sets for this jaxlib."""
    major, minor = runtime.jaxlib_version().split('.')[:2]
    return ' '.join(runtime.CPU_FLAGS.get((int(major), int(minor)), {}).values())


FLAX = Peer('ablation_flax')
KERAS_ON_JAX = Peer('ablation_keras', 'keras_jax', {'KERAS_BACKEND': 'jax'})
KERAS_ON_TENSORFLOW = Peer('ablation_keras', 'keras_tensorflow', {'KERAS_BACKEND': 'tensorflow'})
PYTORCH = Peer('ablation_torch', 'pytorch')
PEERS = {
    'Flax': FLAX,
    f'Flax{CACHED}': replace(FLAX, cached=True),
    'Flax, our XLA flags': replace(FLAX, environment={'XLA_FLAGS': xla_flags()}),
    'Keras on JAX': KERAS_ON_JAX,
    f'Keras on JAX{CACHED}': replace(KERAS_ON_JAX, cached=True),
    'Keras on TensorFlow': KERAS_ON_TENSORFLOW,
    'PyTorch': PYTORCH,
}


def contenders_of(
    folder: Path, home: Path, peers: dict[str, Peer], arms: list[str], epochs: int
) -> dict[str, Callable[[int], Outcome]]:
    """What runs, by name: functions of the number of seeds."""

    def ours(seeds: int, cache: Path) -> Outcome:
        work = folder / 'work'
        shutil.rmtree(work, ignore_errors=True)
        command = [
            *(sys.executable, '-m', 'launch.ablate', f'--workdir={work}'),
            f'--config={experiment(folder, arms)}',
            f'--seeds={seeds}',
            f'--config.train.epochs={epochs}',
        ]
        seconds, _, _ = timed(command, {'CNN_JAX_CACHE': str(cache)})
        found = json.loads((work / 'summary.json').read_text())['arms']
        return seconds, {arm: found[arm]['eval']['accuracy']['mean'] for arm in arms}

    def cold(seeds: int) -> Outcome:
        shutil.rmtree(folder / 'empty', ignore_errors=True)
        return ours(seeds, folder / 'empty')

    def of(name: str, peer: Peer) -> Callable[[int], Outcome]:
        # By default, compilations under a second are not kept: Keras's pair of runs of 6 epochs
        # then takes 12 s instead of 8.
        cache = {
            'JAX_COMPILATION_CACHE_DIR': str(folder / name),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        }

        def run(seeds: int) -> Outcome:
            options = []
            for arm in arms:
                config = cfg.replace(get_config(), ARMS[arm])
                common = [f'--epochs={epochs}', *flags(config)]
                options += [[f'--seed={seed}', *common] for seed in range(seeds)]
            seconds, found = peer_runs(peer, home, folder, options, cache if peer.cached else {})
            accuracies = np.reshape([each['test'] for each in found], (len(arms), seeds))
            return seconds, dict(zip(arms, accuracies.mean(axis=1)))

        return run

    return {
        OURS: cold,
        f'{OURS}{CACHED}': lambda seeds: ours(seeds, folder / 'full'),
        **{name: of(name, peer) for name, peer in peers.items()},
    }


def experiment(folder: Path, arms: list[str]) -> str:
    """The experiment's file, or one with some of its arms."""
    if arms == list(ARMS):
        return 'experiments/regularization.py'
    path = folder / 'regularization.py'
    chosen = {arm: ARMS[arm] for arm in arms}
    path.write_text(
        f'from experiments.regularization import get_config as get_config\n\nARMS = {chosen!r}\n'
    )
    return str(path)


def write_images(folder: Path) -> None:
    """Both splits as the peers read them, data.npz."""
    arrays = {}
    for name, which in (('train', 'train'), ('test', 'eval')):
        split = open_batches(get_config().data, which)
        arrays |= {f'{name}_x': split.read(np.arange(split.n)), f'{name}_y': split.labels}
    np.savez(folder / 'data.npz', **arrays)


def peer_runs(
    peer: Peer,
    peers: Path,
    folder: Path,
    options: list[list[str]],
    environment: dict[str, str] | None = None,
) -> tuple[float, list[dict]]:
    """Run a peer's script once for each list of options; the seconds of all, and their answers."""
    # One thread on a core of its own is the best for every peer. Processor seconds of one of two
    # runs at once, so against default threads: Flax 23 and 24, Keras on JAX 24 and 26, on
    # TensorFlow 18 and 20 (20 epochs); PyTorch 7 and 35 (6 epochs).
    command = [*peer.command(peers), str(folder / 'data.npz')]
    seconds, texts = pooled(
        [command + each for each in options],
        peer.environment | (environment or {}),
        at_once=cores(),
        pinned=True,
    )
    return seconds, [json.loads(text.splitlines()[-1]) for text in texts]


def flags(config: cfg.Config) -> list[str]:
    """A config as options of a peer's script: `model.dropout` is `--dropout`."""
    return [f'--{path.split(".")[-1]}={cfg.get(config, path)}' for path in OPTIONS]


GATE_STEPS = 20
# Each of Adam's first steps is of the rate's size, rounding errors too: at 1e-4 the losses of
# equal networks with batch normalization part by 1e-3 within 20 steps, at this rate by 1e-4,
# while they fall by a tenth.
GATE_RATE = 1e-5


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser('benchmarks.ablation', description=__doc__)
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--peers', type=Path, default=Path('.bench'), help='of setup_peers.sh')
    parser.add_argument('--arms', default=','.join(ARMS), help='two or more, the baseline first')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument(
        '--only',
        nargs='+',
        choices=PEERS,
        default=list(PEERS),
        metavar='PEER',
        help='; '.join(PEERS),
    )
    parser.add_argument('--out', type=Path, help='results file whose section is replaced')
    arguments = parser.parse_args()
    arms = arguments.arms.split(',')
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f'there is no arm {unknown[0]!r}; there are {", ".join(ARMS)}')
    body = measure(
        arguments.rounds,
        arguments.peers,
        {name: PEERS[name] for name in arguments.only},
        arms,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
    )
    print(body)
    if arguments.out:
        title = f'Ablation: {len(arms)} arms x {arguments.seeds} seeds'
        results.write_section(arguments.out, title, body)


def measure(
    rounds: int, home: Path, peers: dict[str, Peer], arms: list[str], *, seeds: int, epochs: int
) -> str:
    """The table, as Markdown.

    Args:
        rounds: How often each contender has its turn.
        home: The folder of the peers' environments.
        peers: By name.
        arms: Of the experiment.
        seeds, epochs: Of each arm.

    Errors:
        contest.Disagreement: The contenders' losses differ.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder)
        versions, difference = pass_gate(folder, home, peers, arms)
        contenders = contenders_of(folder, home, peers, arms, epochs)
        for name in contenders:
            if name.endswith(CACHED):
                print(f'compile cache: {name}', file=sys.stderr)
                contenders[name](1)
        outcomes = {name: [] for name in contenders}
        for number in range(rounds):
            for name in rotated(contenders, number):
                outcomes[name].append(contenders[name](seeds))
                taken = outcomes[name][-1][0]
                print(f'round {number + 1} of {rounds}: {name}: {taken:.1f} s', file=sys.stderr)
    config = get_config()
    return f"""{results.conditions('jax', 'jaxlib', 'optax')}, {', '.join(versions)}

The small net on 500 MNIST images, batch {config.data.batch}, {epochs} epochs, Adam, evaluated on
1,000 test images after every epoch and on both splits at the end, {seeds} seeds of every arm.
The whole ablation, {cores()} processes at a time: ours is one command, its report
included, from an empty cache; a peer's is a process for each run.
Median [quartiles] of {rounds} interleaved rounds; ratios are taken within a round.
A process has one thread on a core of its own, which is the best for every contender here.
Compile cache: full from an earlier run.
The losses of the first {GATE_STEPS} steps without dropout agree within {difference:.0e}, relative.
On the right: mean test accuracy, %.

{table(outcomes, arms)}
"""


def table(outcomes: dict[str, list[Outcome]], arms: list[str]) -> str:
    """Seconds, ratios to this project in the same round, and accuracies."""
    reference = [seconds for seconds, _ in outcomes[OURS]]
    rows = []
    for name, taken in outcomes.items():
        seconds = [each for each, _ in taken]
        ratios = [each / r for each, r in zip(seconds, reference)]
        accuracies = [np.mean([found[arm] for _, found in taken]) for arm in arms]
        rows.append(
            [
                name,
                results.quartiles(seconds),
                results.quartiles(ratios, digits=2),
                *(f'{100 * accuracy:.1f}' for accuracy in accuracies),
            ]
        )
    return results.table(('contender', 'seconds', f'of {OURS}', *arms), rows)


def pass_gate(
    folder: Path, home: Path, peers: dict[str, Peer], arms: list[str]
) -> tuple[list[str], float]:
    """The peers' versions, and how far the losses of all contenders are apart.

    Errors:
        contest.Disagreement: They differ.
    """
    options, expected = [], []
    for i, config in enumerate(gate_configs(arms)):
        path = folder / f'gate{i}.npz'
        problem.write(gate_problem(config), path)
        options.append([*flags(config), f'--losses={path}'])
        worker = Worker('benchmarks.ours', path, settings=True)
        try:
            expected.append(worker.ask(losses=GATE_STEPS)['losses'])
        finally:
            worker.close()
    found = {
        name: peer_runs(peer, home, folder, options)[1]
        for name, peer in peers.items()
        if not peer.cached
    }
    versions = list(dict.fromkeys(runs[0]['version'] for runs in found.values()))
    losses = {name: [run['losses'] for run in runs] for name, runs in found.items()}
    return versions, largest_difference({OURS: expected} | losses)


def largest_difference(losses: dict[str, list[list[float]]]) -> float:
    """Of any contender's losses from the first one's, in any of the problems.

    Errors:
        contest.Disagreement: They differ.
    """
    problems = zip(*losses.values(), strict=True)
    return max(contest.check(dict(zip(losses, each))) for each in problems)


def gate_configs(arms: list[str]) -> list[cfg.Config]:
    """The arms without dropout, at the gate's learning rate; equal ones once."""
    constant = {'optimizer.learning_rate': GATE_RATE, 'optimizer.schedule': 'constant'}
    without = constant | {'model.dropout': 0.0, 'model.head_dropout': 0.0}
    configs = [cfg.replace(get_config(), ARMS[arm] | without) for arm in arms]
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def gate_problem(config: cfg.Config) -> problem.Problem:
    """The first batches in the images' order, and initial weights."""
    train = open_batches(config.data, 'train')
    shape = (-1, config.data.batch)
    return workloads.problem(
        config,
        setup.preprocessing(config, train, None),
        train.read(np.arange(train.n)).reshape(*shape, *train.image_shape),
        train.labels.reshape(shape),
        len(train.class_names),
    )


if __name__ == '__main__':
    cli.run(main)
