"""An ablation's work directory with results drawn at random, and a real browser."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn_jax.files import read_json, write_json

EXAMPLES = 400
DATA = {'data.source': 'mnist_5k', 'data.train': 'train[:500]', 'data.eval': 'test'}
EFFECTS = {'none': 0.0, 'dropout': 0.05, 'batch norm': 0.06, 'L2': 0.002, 'together': 0.08}


@pytest.fixture
def ablation(tmp_path: Path, write_ablation: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a work directory of this test's own."""
    return functools.partial(write_ablation, tmp_path / 'run')


@pytest.fixture(scope='session')
def write_ablation() -> Callable[..., Path]:
    """Writes a work directory; an arm's gain is the accuracy that it adds."""

    def write(
        folder: Path,
        gains: dict[str, float] = EFFECTS,
        seeds: int = 5,
        spread: float = 0.01,
        **changes: Any,
    ) -> Path:
        (folder / 'cells').mkdir(parents=True, exist_ok=True)
        definition = {
            'name': 'regularization',
            'question': 'What does each regularizer buy?\n\nOn 500 images.\n\n    a command',
            'baseline': next(iter(gains)),
            'arms': {arm: {'changes': {'model.dropout': i / 10}} for i, arm in enumerate(gains)},
            'factors': None,
            'configs': dict.fromkeys(gains, DATA),
            'seeds': list(range(seeds)),
            'metric': 'accuracy',
            'command': 'python -m launch.ablate --config=experiments/regularization.py',
            'identity': {'code': 'c0de'},
            'manifest': {'packages': {'jax': '0.10.2'}},
            'budgets': dict.fromkeys(gains, '3 epochs'),
        }
        write_json(folder / 'ablation.json', definition | changes)
        generator = np.random.default_rng(0)
        difficulty, luck = generator.random(EXAMPLES), generator.normal(0, spread, seeds)
        for place, (arm, effect) in enumerate(gains.items()):
            for seed in range(seeds):
                wanted = 0.85 + effect + luck[seed] + generator.normal(0, spread / 3)
                correct = difficulty < np.quantile(difficulty, np.clip(wanted, 0, 1))
                path = folder / 'cells' / f'{place}-{seed}.json'
                write_json(path, result(arm, seed, correct))
        return folder

    return write


@pytest.fixture(scope='session')
def finished() -> Callable[[float], dict[str, Any]]:
    """Makes the result of a finished run of an accuracy, without its arm and seed."""

    def make(accuracy: float) -> dict[str, Any]:
        whole = result('', 0, np.arange(EXAMPLES) < accuracy * EXAMPLES)
        return {name: part for name, part in whole.items() if name not in ('arm', 'seed')}

    return make


def result(arm: str, seed: int, correct: np.ndarray) -> dict[str, Any]:
    """A finished run whose network has these evaluation examples right."""
    accuracy = float(correct.mean())

    def metrics(accuracy: float, count: int) -> dict[str, float]:
        return {
            'loss': 2 - accuracy,
            'accuracy': accuracy,
            'top5': 1.0,
            'calibration_error': 1 - accuracy,
            'count': count,
        }

    return {
        'arm': arm,
        'seed': seed,
        'status': 'done',
        'metrics': {'train': metrics(0.99, 500), 'eval': metrics(accuracy, len(correct))},
        'curves': [
            {'step': 10 * e, 'epoch': float(e), 'split': split, **metrics(accuracy * e / 3, 1)}
            for e in (1, 2, 3)
            for split in ('train', 'eval')
        ],
        'correct': np.packbits(correct).tobytes().hex(),
        'seconds': 2.5,
        'wall_seconds': 2.0,
        'parameters': 1000,
        'steps': 30,
    }


@pytest.fixture(scope='session')
def change_result() -> Callable[..., None]:
    """Overwrites fields of a result on disk."""

    def change(folder: Path, name: str, **fields: Any) -> None:
        path = folder / 'cells' / f'{name}.json'
        write_json(path, read_json(path) | fields)

    return change
