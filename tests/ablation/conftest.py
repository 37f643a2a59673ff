"""An ablation's work directory with results drawn at random."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from cnn_jax import config as cfg
from cnn_jax.ablation import decisions
from cnn_jax.ablation.plan import log, make_plan
from cnn_jax.ablation.results import AGAIN, FLOOR, Result, Run, Store, open_store

EXAMPLES, CLASSES = 400, 10
IMAGES = cfg.Data(source='mnist_5k', train='train[:1000]', subset=200, validation=200)
TUNE = {'optimizer.learning_rate': log(3e-4, 3e-2)}
EFFECTS = {'none': 0.0, 'dropout': 0.05, 'batch norm': 0.06, 'L2': 0.002, 'together': 0.08}
PROVENANCE = {'code': 'c0de', 'training data': 'da7a', 'test data': 'da7b', 'jaxlib': '1'}


@pytest.fixture
def ablation(tmp_path: Path, write_ablation: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a work directory of this test's own, as `write_ablation`."""
    return functools.partial(write_ablation, tmp_path / 'run')


@pytest.fixture(scope='session')
def write_ablation() -> Callable[..., Path]:
    """Writes a work directory, or more of one, by way of its store."""

    def write(
        folder: Path,
        gains: Mapping[str, float] = EFFECTS,
        *,
        spread: float = 0.01,
        change: Callable[[Run, Result], Result | None] = lambda run, result: result,
        arms: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        command: str = 'python -m launch.ablate --config=experiments/regularization.py',
        **study: Any,
    ) -> Path:
        """Write; `change` gets each run and its result, and returns another, or None for none.

        Args:
            folder: Work directory.
            gains: The accuracy that each arm adds to that of the first, by its name.
            spread: Standard deviation of the replicates' accuracy; a third of it is not shared.
            change: As above.
            arms: The arms' changes; else each has a dropout of its own.
            data: Changes to the config of the data, by field.
            command: The command that the report shows.
            study: Arguments of `make_plan`; 5 seeds and 4 trials of the learning rate by default.
        """
        images = {f'data.{name}': value for name, value in (data or {}).items()}
        changes = arms or {arm: {'model.dropout': i / 100} for i, arm in enumerate(gains)}
        study = {'seeds': 5, 'trials': 4, 'tune': TUNE, 'name': 'regularization'} | study
        study.setdefault('question', 'What does each regularizer buy?\n\nOn 200 images.\n\n    go')
        config = cfg.replace(cfg.Config(data=IMAGES), images)
        plan = make_plan({} if 'factors' in study else changes, config, **study)
        counts = {'pool': 1000, 'train': config.data.subset, 'validation': 200}
        facts = {
            'command': command,
            'manifest': {'packages': {'jax': '0.10.2'}},
            'budgets': dict.fromkeys(plan.configs, '3 epochs'),
            'counts': counts | {'test': EXAMPLES, 'classes': CLASSES},
        }
        store = open_store(folder, plan, PROVENANCE, facts)
        left_out: set[Run] = set()
        while runs := [run for run in decisions.missing(store) if run not in left_out]:
            for run in runs:
                accuracy = 0.85 + gains.get(run.arm, 0.0)
                result = change(run, result_of(store, run, accuracy, spread))
                if result is None:
                    left_out.add(run)
                else:
                    store.write(run, result)
        return folder

    return write


def result_of(store: Store, run: Run, accuracy: float, spread: float) -> Result:
    """The result of a run; a trial's loss is least at a rate of 3e-3, its accuracy best at 1e-2."""
    shared = np.random.default_rng(run.seed)
    own = np.random.default_rng([run.seed, [*store.plan.configs].index(run.arm)])
    accuracy += shared.normal(0, spread) + own.normal(0, spread / 3)
    facts = {'seconds': 2.5, 'wall_seconds': 2.0, 'classes': CLASSES, 'examples': EXAMPLES}
    if run.kind == FLOOR:
        return facts | {'status': 'done', 'metrics': {'test': {'accuracy': 0.8, 'count': EXAMPLES}}}
    if run.kind == 'trial':
        for_loss, for_accuracy = abs(
            np.log10(run.config.optimizer.learning_rate / np.array([3e-3, 1e-2]))
        )
        loss = 1.2 - accuracy + 0.3 * for_loss
        metrics = {'validation': {'loss': loss, 'accuracy': accuracy - 0.3 * for_accuracy}}
        return facts | {'status': 'done', 'metrics': metrics}
    return facts | judged(accuracy, own, curves=store.plan.curves and run.kind != AGAIN)


def judged(accuracy: float, generator: np.random.Generator, curves: bool = False) -> Result:
    """The result of a replicate of about this accuracy; difficult images are so for all."""
    difficulty = np.random.default_rng(0).normal(size=EXAMPLES)
    skill = special.ndtri(np.clip(accuracy, 0.001, 0.999)) * np.sqrt(1.1)
    margin = skill - difficulty + generator.normal(0, np.sqrt(0.1), EXAMPLES)
    losses, right = np.log1p(np.exp(-2 * margin)).astype('<f2'), margin > 0

    def measures(accuracy: float, loss: float, count: int = 200) -> dict[str, float]:
        rest = {'top5': 1.0, 'calibration_error': 1 - accuracy, 'count': count}
        return {'accuracy': accuracy, 'loss': loss, **rest}

    test = measures(float(right.mean()), float(losses.astype(float).mean()), EXAMPLES)
    return {
        'status': 'done',
        'metrics': {'train': measures(0.99, 0.05), 'validation': test, 'test': test},
        'curves': [
            {'step': 10 * e, 'epoch': float(e), 'split': split}
            | measures(accuracy * e / 3, 1 / e + (split == 'eval'))
            for e in (1, 2, 3)
            for split in ('train', 'eval')
            if curves
        ],
        'checks': {
            'weight_norm': 20 + accuracy,
            'gradient_norm': 0.3 * accuracy,
            'training_loss': 1.02 - accuracy,
        },
        'correct': np.packbits(right).tobytes().hex(),
        'losses': losses.tobytes().hex(),
        'parameters': 1000,
        'steps': 30,
    }
