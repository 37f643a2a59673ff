"""The plan of an ablation: a baseline, arms as differences from it, seeds, a metric."""

import dataclasses
import hashlib
import itertools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.errors import UserError

Changes = Mapping[str, Any]  # {'model.dropout': 0.25, …}

TRAINING = ('ablation/training.py',)  # what decides a result in this package


@dataclass(frozen=True)
class Metric:
    """A metric and how its values are printed.

    Attributes:
        name: Key in the results.
        scale: Factor from its value to the printed number.
        unit: Unit of a difference.
        suffix: Unit of a value.
        sign: 1 where higher is better, −1 where lower is.
        most: The largest possible value; the smallest is 0.
    """

    name: str
    scale: float
    unit: str
    suffix: str
    sign: int
    most: float

    @property
    def title(self) -> str:
        """The name as a reader sees it."""
        return self.name.replace('_', ' ')


METRICS = {
    'accuracy': Metric('accuracy', 100, 'percentage points', '%', 1, 1.0),
    'top5': Metric('top5', 100, 'percentage points', '%', 1, 1.0),
    'calibration_error': Metric('calibration_error', 100, 'percentage points', '%', -1, 1.0),
    'loss': Metric('loss', 1, 'nats', '', -1, math.inf),
}


def number(value: float | None, decimals: int, signed: bool = False) -> str:
    """A number with a true minus sign; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return '–'
    text = f'{value:+.{decimals}f}' if signed else f'{value:.{decimals}f}'
    if float(text) == 0:
        text = text.lstrip('+-')
    return text.replace('-', '−')


@dataclass(frozen=True)
class Plan:
    """An ablation before it runs.

    Attributes:
        name: Name of the ablation, such as that of its experiment file.
        question: The question that it answers; the docstring of its file.
        baseline: Name of the arm that the others are compared with.
        configs: The validated config of each arm, by name, with seed 0.
        changes: The changes of each arm to the experiment's config.
        seeds: Seeds; each arm runs once with each.
        metric: The metric that is compared, of the evaluation split: a key of `METRICS`.
        factors: Levels of each factor of a factorial grid, or None.
        levels: The levels of each arm of the grid.
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

    @property
    def threads(self) -> int:
        """CPU threads of a run; 0: one for each core."""
        return self.configs[self.baseline].train.threads

    def config(self, arm: str, seed: int) -> cfg.Config:
        """The config of one run."""
        return cfg.replace(self.configs[arm], {'seed': seed})

    def to_json(self) -> str:
        """The plan as text, for another process."""
        configs = {arm: cfg.to_flat(config) for arm, config in self.configs.items()}
        return json.dumps({**vars(self), 'configs': configs})

    @classmethod
    def from_json(cls, text: str) -> 'Plan':
        """The plan that `to_json` wrote."""
        content = json.loads(text)
        configs = {a: cfg.replace(cfg.Config(), flat) for a, flat in content['configs'].items()}
        return cls(**{**content, 'configs': configs, 'seeds': tuple(content['seeds'])})


def plan_of(experiment: types.ModuleType, config: cfg.Config, seeds: int = 0) -> Plan:
    """The plan in an experiment file.

    The file has `get_config()` and either `ARMS`, `{name: {config path: value}}`, of which the
    first is the baseline, or `FACTORS`, `{factor: {level: {config path: value}}}`, whose grid
    gives the arms and whose first levels are the baseline. It may have `SEEDS` (default 5) and
    `METRIC` (default accuracy).

    Args:
        experiment: The loaded file.
        config: Its config with the command line's overrides; arms change it further.
        seeds: Number of seeds instead of `SEEDS`; 0 keeps them.

    Errors:
        UserError: There are no arms, one is not a valid config, or two are the same.
    """
    name = Path(experiment.__file__ or 'ablation').stem
    arms, factors = (getattr(experiment, each, None) for each in ('ARMS', 'FACTORS'))
    if not arms and not factors:
        raise UserError(
            f'experiments/{name}.py is not an ablation: it has neither ARMS nor FACTORS; '
            'train it with launch.train'
        )
    return make_plan(
        arms or {},
        config,
        seeds=seeds or getattr(experiment, 'SEEDS', 5),
        metric=getattr(experiment, 'METRIC', 'accuracy'),
        factors=None if arms else factors,
        name=name,
        question=(experiment.__doc__ or '').strip(),
        where=f' of experiments/{name}.py',
    )


def make_plan(
    arms: Mapping[str, Changes],
    config: cfg.Config,
    *,
    seeds: int = 5,
    metric: str = 'accuracy',
    factors: Mapping[str, Mapping[str, Changes]] | None = None,
    name: str = 'ablation',
    question: str = '',
    where: str = '',
) -> Plan:
    """The plan of these arms, the first of which is the baseline.

    Args:
        arms: The changes of each arm to the config, `{name: {config path: value}}`.
        config: The config that the arms change; its seed is the first one.
        seeds: Number of seeds.
        metric: A key of `METRICS`.
        factors: The factors of a grid that gives the arms instead, as in an experiment file.
        name, question: Headings of the report.
        where: The place of the arms, for errors.

    Errors:
        UserError: An arm is not a valid config, two are the same, or the metric is unknown.
    """
    levels: dict[str, dict[str, str]] = {}
    if factors:
        arms, levels = grid(factors)
    configs = {}
    for arm, changes in arms.items():
        if not arm.isprintable():
            raise UserError(f'arm {arm!r}{where} has characters that cannot be printed; rename it')
        try:
            configs[arm] = cfg.validate(cfg.replace(config, dict(changes)))
        except UserError as error:
            raise UserError(f'arm {arm!r}{where}: {error}') from error
        data = configs[arm].data
        first = next(iter(configs.values())).data
        if dataclasses.replace(data, batch=first.batch) != first:
            raise UserError(
                f'arm {arm!r}{where} changes config.data; all arms must see the same images, and '
                'only config.data.batch may differ'
            )
    for one, other in itertools.combinations(configs, 2):
        if configs[one] == configs[other]:
            raise UserError(f'the arms {one!r} and {other!r}{where} are the same')
    if metric not in METRICS:
        raise UserError(f'the metric{where} is {metric!r}; it can be {", ".join(METRICS)}')
    return Plan(
        name=name,
        question=question,
        baseline=next(iter(arms)),
        configs=configs,
        changes={arm: dict(changes) for arm, changes in arms.items()},
        seeds=tuple(config.seed + i for i in range(seeds)),
        metric=metric,
        factors={f: list(each) for f, each in factors.items()} if factors else None,
        levels=levels,
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
    """The arms in groups that share one compilation: they differ in traced numbers only."""
    groups: dict[str, list[str]] = {}
    for arm, config in plan.configs.items():
        groups.setdefault(repr(sorted(cfg.structure(config).items())), []).append(arm)
    return list(groups.values())


def budget(config: cfg.Config, examples: int) -> str:
    """The training budget of an arm in words; no arm's hyperparameters are tuned separately."""
    epochs, steps = (
        config.train.epochs + config.unfreeze.epochs,
        cfg.phase_ends(config, examples)[-1],
    )
    short = cfg.short_average(config, steps)
    return (
        f'{epochs:g} epochs of {examples:,} images = {steps:,} steps of {config.data.batch}, '
        f'{config.optimizer.name} at learning rate {config.optimizer.learning_rate:g}'
        + (f'; note: {short}' if short else '')
    )


def code_digest() -> str:
    """SHA-256 of the source files that a result depends on: all but the analysis."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        relative = path.relative_to(root).as_posix()
        if not relative.startswith('ablation/') or relative in TRAINING:
            total.update(relative.encode() + b'\0' + path.read_bytes() + b'\0')
    return total.hexdigest()
