"""What an ablation compares: a baseline, arms as differences from it, seeds."""

import hashlib
import itertools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.ablation.wording import METRICS
from cnn_jax.errors import UserError
from cnn_jax.validation import validate

Changes = dict[str, Any]  # {'model.dropout': 0.25, …}

TRAINING = ('ablation/cell.py', 'ablation/compiled.py')  # what decides a result in this package


@dataclass(frozen=True)
class Plan:
    """An ablation before it runs.

    Attributes:
        name: Of the experiment file.
        question: Its docstring.
        baseline: Name of the arm that the others are compared with.
        configs: The validated config of each arm, by name, with seed 0.
        changes: What each arm changes in the experiment's config.
        seeds: Each arm runs once with each.
        metric: What is compared, of the evaluation split: a key of `wording.METRICS`.
        factors: Levels of each factor of a factorial grid, or None.
        levels: Of each arm in the grid.
    """

    name: str
    question: str
    baseline: str
    configs: dict[str, cfg.Config]
    changes: dict[str, Changes]
    seeds: tuple[int, ...]
    metric: str
    factors: dict[str, list[str]] | None
    levels: dict[str, dict[str, str]]

    def cell_config(self, arm: str, seed: int) -> cfg.Config:
        """The config of one cell."""
        return cfg.replace(self.configs[arm], {'seed': seed})


def plan_of(experiment: types.ModuleType, config: cfg.Config, seeds: int = 0) -> Plan:
    """The plan in an experiment file.

    The file has `get_config()` and either `ARMS`, `{name: {config path: value}}`, of which the
    first is the baseline, or `FACTORS`, `{factor: {level: {config path: value}}}`, whose grid
    gives the arms and whose first levels are the baseline. It may have `SEEDS` (default 5) and
    `METRIC` (default accuracy).

    Args:
        experiment: The loaded file.
        config: Its config with the command line's overrides; arms change it further.
        seeds: How many instead of `SEEDS`; 0 keeps them.

    Errors:
        UserError: There are no arms, one is not a valid config, or two are the same.
    """
    name = Path(experiment.__file__ or 'ablation').stem
    factors = getattr(experiment, 'FACTORS', None)
    arms = getattr(experiment, 'ARMS', None) or (factors and grid(factors)[0])
    if not arms:
        raise UserError(
            f'experiments/{name}.py is not an ablation: it has neither ARMS nor FACTORS; '
            'train it with launch.train'
        )
    configs = {}
    for arm, changes in arms.items():
        if not arm.isprintable():
            raise UserError(
                f'arm {arm!r} of experiments/{name}.py has characters that cannot be shown; '
                'rename it'
            )
        try:
            configs[arm] = validate(cfg.replace(config, changes))
        except UserError as error:
            raise UserError(f'arm {arm!r} of experiments/{name}.py: {error}') from error
    for one, other in itertools.combinations(configs, 2):
        if configs[one] == configs[other]:
            raise UserError(f'the arms {one!r} and {other!r} of experiments/{name}.py are the same')
    metric = getattr(experiment, 'METRIC', 'accuracy')
    if metric not in METRICS:
        raise UserError(
            f'METRIC of experiments/{name}.py is {metric!r}; it can be {", ".join(METRICS)}'
        )
    count = seeds or getattr(experiment, 'SEEDS', 5)
    return Plan(
        name=name,
        question=(experiment.__doc__ or '').strip(),
        baseline=next(iter(arms)),
        configs=configs,
        changes={arm: dict(changes) for arm, changes in arms.items()},
        seeds=tuple(config.seed + i for i in range(count)),
        metric=metric,
        factors={f: list(levels) for f, levels in factors.items()} if factors else None,
        levels=grid(factors)[1] if factors else {},
    )


def grid(
    factors: Mapping[str, Mapping[str, Changes]],
) -> tuple[dict[str, Changes], dict[str, dict[str, str]]]:
    """The arms of a full factorial design and their levels; the first arm has all first levels."""
    arms, levels = {}, {}
    for combination in itertools.product(*(factor.items() for factor in factors.values())):
        name = ', '.join(level for level, _ in combination)
        arms[name] = {k: v for _, changes in combination for k, v in changes.items()}
        levels[name] = dict(zip(factors, (level for level, _ in combination)))
    return arms, levels


def by_structure(plan: Plan) -> list[list[str]]:
    """The arms in groups that share one compilation: they differ in values only."""
    groups: dict[str, list[str]] = {}
    for arm, config in plan.configs.items():
        groups.setdefault(repr(sorted(cfg.structure(config).items())), []).append(arm)
    return list(groups.values())


def budget(config: cfg.Config, examples: int) -> str:
    """What an arm may spend, in words; no arm's hyper-parameters are tuned apart."""
    epochs, batch = config.train.epochs + config.unfreeze.epochs, config.data.batch
    steps = int(epochs * examples / batch + 1e-9)
    rate = config.optimizer.learning_rate
    return (
        f'{epochs:g} epochs of {examples:,} images = {steps:,} steps of {batch}, '
        f'{config.optimizer.name} at learning rate {rate:g}'
    )


def code_digest() -> str:
    """SHA-256 of the source files that a cell's result depends on: all but the analysis."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        relative = path.relative_to(root).as_posix()
        if not relative.startswith('ablation/') or relative in TRAINING:
            total.update(relative.encode() + b'\0' + path.read_bytes() + b'\0')
    return total.hexdigest()
