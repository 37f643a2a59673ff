"""Tuning of a single run: some trials on held-out images choose its numbers before it begins."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import Range, code_digest, make_plan
from cnn_jax.ablation.results import Choice, chosen, value_of
from cnn_jax.ablation.training import compile_structure, train_runs
from cnn_jax.components import Components
from cnn_jax.errors import UserError
from cnn_jax.files import Corrupt, read_json, write_json

NAME = 'tuning.json'


def choose(
    config: cfg.Config,
    data: Any,
    tune: Mapping[str, Range],
    folder: Path,
    components: Components,
    say: Callable[[str], object],
) -> dict[str, float]:
    """Choose the point of the least loss on the held-out images, of `config.train.trials`.

    A trial is the run itself at one point, its early stopping included. `tuning.json` keeps each
    as it ends, so that an interrupted choice goes on, unless config, data or code have changed.

    Args:
        config, data, components: The run's.
        tune: What is tuned, by config path.
        folder: The run's work directory.
        say: Called with a line for each trial.
    """
    if not tune:
        raise UserError(
            'config.train.trials is set, but nothing is tuned; give fit(tune=…), or an experiment '
            "file a TUNE = {'optimizer.learning_rate': log(1e-4, 1e-2)}"
        )
    plan = make_plan({'run': {}}, config, tune=tune, trials=config.train.trials, seeds=1)
    points, path = plan.points['run'], folder / NAME
    facts = [cfg.content_hash(config), code_digest(), data.description]
    about = {'points': points, 'of': hashlib.sha256(json.dumps(facts).encode()).hexdigest()}
    losses = _losses(path, about)
    compiled = None
    for number, point in enumerate(points[len(losses) :], len(losses)):
        compiled = compiled or compile_structure(plan.configs['run'], data, components=components)
        at = cfg.replace(plan.configs['run'], point)
        [result] = train_runs([at], compiled, data, trial=True, curves=False)
        losses.append(value_of(result, 'validation', 'loss'))
        write_json(path, {**about, 'losses': losses})
        listed = ', '.join(f'{path}={value:.3g}' for path, value in point.items())
        found = 'failed' if losses[-1] is None else f'held-out loss {losses[-1]:.4f}'
        say(f'trial {number + 1} of {len(points)}: {listed}: {found}')
    if all(loss is None for loss in losses):
        raise UserError(
            f'none of the {len(points)} trials has a finite loss; lower the ranges that are tuned'
        )
    best: Choice = chosen(points, losses)
    listed = ', '.join(f'config.{path}={value:.4g}' for path, value in best.point.items())
    say(f'tuned to {listed}')
    if best.at_edge:
        say(f'note: at the edge of what was tried: {", ".join(best.at_edge)}')
    return best.point


def _losses(path: Path, about: dict[str, Any]) -> list[float | None]:
    """The losses of the trials that have ended, of the same run at the same points."""
    try:
        before = read_json(path)
    except (FileNotFoundError, Corrupt):  # it costs seconds to try again
        return []
    return before['losses'] if {name: before.get(name) for name in about} == about else []
