"""The plan of an ablation: a baseline, arms as differences from it, seeds, a metric."""

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
from cnn_jax.errors import UserError, printable

Changes = Mapping[str, Any]  # {'model.dropout': 0.25, …}

TRAINING = ('ablation/training.py',)  # what decides a result in this package
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Metric:
    """A metric and how its values are printed."""

    name: str  # the key in the results
    scale: float  # factor from its value to the printed number
    unit: str  # of a difference
    suffix: str  # the unit of a value
    sign: int  # 1 where higher is better, −1 where lower is
    most: float  # the largest possible value; the smallest is 0

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
    """An ablation before it runs."""

    name: str  # such as that of its experiment file
    question: str  # that it answers; the docstring of its file
    baseline: str  # the arm that the others are compared with
    configs: dict[str, cfg.Config]  # of each arm, validated
    changes: dict[str, Changes]  # of each arm, to the experiment's config
    seeds: tuple[int, ...]  # each arm runs once with each
    metric: str  # that is compared, of the evaluation split: a key of `METRICS`
    factors: dict[str, list[str]] | None  # levels of each factor of a grid
    levels: dict[str, dict[str, str]]  # of each arm of the grid

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
    name = printable(Path(experiment.__file__ or 'ablation').stem)
    arms, factors = (getattr(experiment, each, None) for each in ('ARMS', 'FACTORS'))
    where = f' of experiments/{name}.py'
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
        question=str(experiment.__doc__ or '').strip(),
        where=where,
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
    """The plan of these arms, the first of which is the baseline; as `plan_of` for a file.

    Args:
        arms: The changes of each arm to the config, `{name: {config path: value}}`.
        config: The config that the arms change; its seed is the first one.
        seeds, metric, factors: As in an experiment file.
        name, question: Headings of the report.
        where: The place of the arms, for errors.
    """
    levels: dict[str, dict[str, str]] = {}
    if factors:
        if not isinstance(factors, Mapping) or not all(isinstance(each, str) for each in factors):
            raise UserError(f'the factors{where} must be {{factor: {{level: changes}}}}')
        for factor, each in factors.items():
            _check_arms(each, f' of factor {factor!r}{where}')
        arms, levels = grid(factors)
    _check_arms(arms, where)
    most = min(MOST_SEEDS, 2**32 - config.seed)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or not 0 < seeds <= most:
        raise UserError(f'the seeds{where} are {seeds!r}; give a number from 1 to {most:,}')
    if not isinstance(metric, str) or metric not in METRICS:
        raise UserError(f'the metric{where} is {metric!r}; it can be {", ".join(METRICS)}')
    configs = {arm: _arm_config(arm, changes, config, where) for arm, changes in arms.items()}
    for one, other in itertools.combinations(configs, 2):
        if configs[one] == configs[other]:
            raise UserError(f'the arms {one!r} and {other!r}{where} are the same')
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


def _arm_config(arm: str, changes: Changes, config: cfg.Config, where: str) -> cfg.Config:
    """The config of an arm, whose runs must see the same images as those of other arms."""
    try:
        changed = cfg.validate(cfg.replace(config, dict(changes)))
    except UserError as error:
        raise UserError(f'arm {arm!r}{where}: {error}') from error
    for path in changes:
        if path == 'seed' or (path.startswith('data.') and path != 'data.batch'):
            raise UserError(
                f'arm {arm!r}{where} changes config.{path}; all arms must see the same images and '
                'have the same seeds; only config.data.batch may differ'
            )
    return changed


def _check_arms(arms: Any, where: str) -> None:
    """Refuse arms of another form, and names that cannot be printed."""
    if not isinstance(arms, Mapping) or not arms:
        raise UserError(f'the arms{where} must be {{name: {{config path: value}}}}')
    for arm, changes in arms.items():
        if not isinstance(arm, str) or not arm.strip() or printable(arm) != arm:
            raise UserError(f'arm {arm!r}{where} needs a name of characters that can be printed')
        if not isinstance(changes, Mapping) or not all(isinstance(each, str) for each in changes):
            raise UserError(f'arm {arm!r}{where} is {changes!r}; it must be {{config path: value}}')


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
    epochs = config.train.epochs + config.unfreeze.epochs
    steps = cfg.phase_ends(config, examples)[-1]
    short = cfg.short_average(config, steps)
    text = f'{epochs:g} epochs of {examples:,} images = {steps:,} steps of {config.data.batch}'
    return f'{text}; note: {short}' if short else text


def code_digest() -> str:
    """SHA-256 of the source files that a result depends on: all but the analysis."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        relative = path.relative_to(root).as_posix()
        if not relative.startswith('ablation/') or relative in TRAINING:
            total.update(relative.encode() + b'\0' + path.read_bytes() + b'\0')
    return total.hexdigest()
