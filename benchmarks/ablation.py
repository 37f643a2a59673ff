"""A whole ablation, `benchmarks/regularization.py`, against one script a run.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.ablation --rounds=1 --out=benchmarks/RESULTS.md

This project runs `launch.ablate`, report included. A peer's user starts a script for each arm and
seed, as many at a time as there are cores. Contenders take turns in every round.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import cli, contest, problem, results, workloads
from benchmarks.contest import Entrant, keras_on, pooled, timed
from benchmarks.regularization import ARMS, get_config
from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.data.batches import open_batches
from cnn_jax.runtime import cores
from cnn_jax.train import setup

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


def xla_flags() -> str:
    """What `runtime.configure` sets for this jaxlib."""
    major, minor = runtime.jaxlib_version().split('.')[:2]
    return ' '.join(runtime.CPU_FLAGS.get((int(major), int(minor)), {}).values())


FLAX, KERAS = Entrant('benchmarks.ablation_flax'), 'benchmarks.ablation_keras'
PEERS = {
    'Flax': FLAX,
    f'Flax{CACHED}': FLAX,
    'Flax, our XLA flags': Entrant(FLAX.module, environment={'XLA_FLAGS': xla_flags()}),
    'Keras on JAX': keras_on('jax', KERAS),
    f'Keras on JAX{CACHED}': keras_on('jax', KERAS),
    'Keras on TensorFlow': keras_on('tensorflow', KERAS),
    'PyTorch': Entrant('benchmarks.ablation_torch', 'pytorch'),
}


def contenders_of(
    folder: Path, home: Path, peers: dict[str, Entrant], epochs: int
) -> dict[str, Callable[[int], Outcome]]:
    """What runs, by name: functions of the number of seeds."""

    def ours(seeds: int, cache: Path) -> Outcome:
        work = folder / 'work'
        shutil.rmtree(work, ignore_errors=True)
        command = [
            *(sys.executable, '-m', 'launch.ablate', f'--workdir={work}'),
            '--config=benchmarks/regularization.py',
            '--curves',
            f'--seeds={seeds}',
            f'--config.train.epochs={epochs}',
        ]
        seconds, _, _ = timed(command, {'CNN_JAX_CACHE': str(cache)})
        found = json.loads((work / 'summary.json').read_text())['arms']
        return seconds, {arm: found[arm]['test']['accuracy']['mean'] for arm in ARMS}

    def cold(seeds: int) -> Outcome:
        return ours(seeds, contest.cold_cache(folder / 'cold'))

    def of(name: str, peer: Entrant) -> Callable[[int], Outcome]:
        # By default, compilations under a second are not kept: Keras's pair of runs of 6 epochs
        # then takes 12 s instead of 8.
        cache = {
            'JAX_COMPILATION_CACHE_DIR': str(folder / name),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        }

        def run(seeds: int) -> Outcome:
            options = []
            for changes in ARMS.values():
                config = cfg.replace(get_config(), changes)
                common = [f'--epochs={epochs}', *flags(config)]
                options += [[f'--seed={seed}', *common] for seed in range(seeds)]
            seconds, found = peer_runs(
                peer, home, folder, options, cache if name.endswith(CACHED) else {}
            )
            accuracies = np.reshape([each['test'] for each in found], (len(ARMS), seeds))
            return seconds, dict(zip(ARMS, accuracies.mean(axis=1)))

        return run

    return {
        OURS: cold,
        f'{OURS}{CACHED}': lambda seeds: ours(seeds, folder / 'full'),
        **{name: of(name, peer) for name, peer in peers.items()},
    }


def write_images(folder: Path) -> None:
    """Both splits as the peers read them, data.npz."""
    arrays = {}
    for name, which in (('train', 'train'), ('test', 'eval')):
        split = open_batches(get_config().data, which)
        arrays |= {f'{name}_x': split.read(np.arange(split.n)), f'{name}_y': split.labels}
    np.savez(folder / 'data.npz', **arrays)


def peer_runs(
    peer: Entrant,
    peers: Path,
    folder: Path,
    options: list[list[str]],
    environment: dict[str, str] | None = None,
) -> tuple[float, list[dict]]:
    """Run a peer's script once for each list of options; the seconds of all, and their answers."""
    # One thread on a core of its own is the best for every peer. Processor seconds of one of two
    # runs at once, so against default threads: Flax 23 and 24, Keras on JAX 24 and 26, on
    # TensorFlow 18 and 20 (20 epochs); PyTorch 7 and 35 (6 epochs).
    command = [peer.interpreter(peers), '-m', peer.module, str(folder / 'data.npz')]
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
    parser = cli.parser('benchmarks.ablation', __doc__, rounds=1)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--epochs', type=int, default=20)
    given = parser.parse_args()
    peers, _ = contest.chosen(PEERS, given.contenders, given.peers)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder)
        versions, difference = pass_gate(folder, given.peers, peers)
        contenders = contenders_of(folder, given.peers, peers, given.epochs)
        for name in contenders:
            if name.endswith(CACHED):
                print(f'compile cache: {name}', file=sys.stderr)
                contenders[name](1)
        outcomes = contest.take_turns(
            contenders, given.rounds, lambda name: contenders[name](given.seeds)
        )
    body = f"""{results.conditions('jax', 'jaxlib', 'optax')}, {', '.join(versions)}

The small net on 500 MNIST images, batch {get_config().data.batch}, {given.epochs} epochs, Adam,
evaluated on 1,000 test images after every epoch and on both splits at the end, {given.seeds} seeds
of every arm. The whole ablation, {cores()} processes at a time: ours is one command, its report and
a second run of the first replicate (A/A) included, with nothing computed before; a peer's is a
process for each run.
Median [quartiles] of {given.rounds} interleaved rounds; ratios are taken within a round.
A process has one thread on a core of its own, which is the best for every contender here.
Compile cache: full from an earlier run.
The losses of the first {GATE_STEPS} steps without dropout agree within {difference:.0e}, relative.
On the right: mean test accuracy, %.

{table(outcomes)}
"""
    cli.publish(f'Ablation: {len(ARMS)} arms x {given.seeds} seeds', body, given.out)


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Seconds, ratios to this project in the same round, and accuracies."""
    reference = [seconds for seconds, _ in outcomes[OURS]]
    rows = []
    for name, taken in outcomes.items():
        seconds = [each for each, _ in taken]
        accuracies = [np.mean([found[arm] for _, found in taken]) for arm in ARMS]
        times = results.quartiles(seconds), contest.ratio(seconds, reference)
        rows.append([name, *times, *(f'{100 * accuracy:.1f}' for accuracy in accuracies)])
    return results.table(('contender', 'seconds', f'of {OURS}', *ARMS), rows)


def pass_gate(folder: Path, home: Path, peers: dict[str, Entrant]) -> tuple[list[str], float]:
    """The peers' versions, and how far the losses of all contenders are apart; or it raises."""
    options, expected = [], []
    for i, config in enumerate(gate_configs()):
        made, path = gate_problem(config), folder / f'gate{i}.npz'
        problem.write(made, path)
        options.append([*flags(config), f'--losses={path}'])
        ours = {OURS: Entrant('benchmarks.ours', settings=True)}
        expected.append(contest.answers_of(ours, made, home, GATE_STEPS)[0][OURS])
    found = {
        name: peer_runs(peer, home, folder, options)[1]
        for name, peer in peers.items()
        if not name.endswith(CACHED)
    }
    versions = list(dict.fromkeys(runs[0]['version'] for runs in found.values()))
    losses = {OURS: expected} | {n: [run['losses'] for run in runs] for n, runs in found.items()}
    problems = zip(*losses.values(), strict=True)
    return versions, max(contest.check(dict(zip(losses, each))) for each in problems)


def gate_configs() -> list[cfg.Config]:
    """The arms without dropout, at the gate's learning rate; equal ones once."""
    constant = {'optimizer.learning_rate': GATE_RATE, 'optimizer.schedule': 'constant'}
    without = constant | {'model.dropout': 0.0, 'model.head_dropout': 0.0}
    configs = [cfg.replace(get_config(), changes | without) for changes in ARMS.values()]
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
