"""What runs in the ablation's benchmark: this project's command, and the peers' scripts.

A peer's user starts a process for each arm and seed, as many at a time as there are cores.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.entrants import interpreter
from benchmarks.process import pooled, timed
from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.data.batches import open_batches
from cnn_jax.runtime import cores
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
