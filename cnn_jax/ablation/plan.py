"""The plan of an ablation: arms and their controls, what is tuned, replicates, measures."""

import dataclasses
import functools
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
from cnn_jax.errors import UserError, nearest, printable

Changes = Mapping[str, Any]  # {'model.dropout': 0.25, 'loss.l2': log(1e-6, 1e-2), …}

TRAINING = ('ablation/training.py', 'ablation/floor.py')  # what decides a result in this package
MOST_SEEDS = 10_000
SEEDS = 10
TRIALS = 8
LOOKS = (5, 10, 20, 30)  # replicates
FINALISTS = 3
TUNING_REPLICATES = 4


@dataclass(frozen=True)
class Metric:
    """A measure and how its values are printed."""

    name: str  # the key in the results
    title: str  # as a reader sees it
    scale: float  # factor from its value to the printed number
    unit: str  # of a difference
    suffix: str  # the unit of a value
    sign: int  # 1 where higher is better, −1 where lower is
    tuned_by: str  # the measure of the held-out images that tuning for this one looks at
    most: float  # the largest possible value; the smallest is 0
    margin: float  # a difference within ±margin matters to nobody, unless the plan says otherwise


METRICS = {
    each.name: each
    for each in (
        Metric('accuracy', 'accuracy', 100, 'points', '%', 1, 'accuracy', 1.0, 0.01),
        Metric('loss', 'negative log-likelihood', 1, 'nats', '', -1, 'loss', math.inf, 0.05),
        Metric('calibration_error', 'calibration error', 100, 'points', '%', -1, 'loss', 1.0, 0.01),
        Metric('top5', 'top-5 accuracy', 100, 'points', '%', 1, 'accuracy', 1.0, 0.01),
    )
}
PRIMARIES = 'accuracy', 'loss'


@dataclass(frozen=True)
class Range:
    """The range of a number that is tuned; it stands in place of a value."""

    low: float
    high: float
    logarithmic: bool

    def at(self, share: float) -> float:
        """The number at a share of the way from `low` to `high`, from 0 to 1."""
        if self.logarithmic:
            return self.low * (self.high / self.low) ** share
        return self.low + (self.high - self.low) * share

    def beyond(self, tried: set[float], edge: float) -> float:
        """The number one step outside those tried, as far from the edge as the next of them."""
        next_one = sorted(tried, key=lambda each: abs(each - edge))[1]
        return edge * edge / next_one if self.logarithmic else 2 * edge - next_one

    def __str__(self) -> str:
        return f'{self.low:g} to {self.high:g}'


def log(low: float, high: float) -> Range:
    """A positive number to be tuned, the same number of trials in every octave."""
    if not 0 < low < high < math.inf:
        raise UserError(f'log({low}, {high}) is not a range; give 0 < low < high')
    return Range(float(low), float(high), True)


def linear(low: float, high: float) -> Range:
    """A number to be tuned, trials evenly spread."""
    if not -math.inf < low < high < math.inf:
        raise UserError(f'linear({low}, {high}) is not a range; give low < high')
    return Range(float(low), float(high), False)


@dataclass(frozen=True)
class Plan:
    """An ablation before it runs."""

    name: str  # such as that of its experiment file
    question: str  # that it answers; the docstring of its file
    baseline: str  # the first arm
    configs: dict[str, cfg.Config]  # of each arm, validated; what is tuned at its range's middle
    changes: dict[str, Changes]  # of each arm, to the experiment's config
    ranges: dict[str, dict[str, Range]]  # what is tuned in each arm, by config path
    trials: int  # of each arm that has ranges
    finalists: int  # an arm's best trials, by each judge, that get all replicates of `tuning`
    tuning: tuple[int, ...]  # the seeds of a trial's replicates
    looks: tuple[int, ...]  # replicates at each look; all arms have those of the first
    first_seed: int
    primaries: tuple[str, ...]  # the measures that are decided on: keys of `METRICS`
    margins: dict[str, float]  # δ of each primary: differences within ±δ are none
    against: dict[str, str]  # the control of each arm but the baseline
    factors: dict[str, list[str]] | None  # levels of each factor of a grid
    levels: dict[str, dict[str, str]]  # of each arm of the grid
    curves: bool  # whether runs are evaluated while they train
    floor: bool  # whether a classifier of pixels stands beside the arms
    widen: int = 0  # the most trials of an arm outside its ranges, while its choice is at an edge

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each replicate, should all looks be reached."""
        return tuple(self.first_seed + i for i in range(self.looks[-1]))

    @property
    def judges(self) -> tuple[str, ...]:
        """The measures that tuning looks at: accuracy, loss or both."""
        return tuple(dict.fromkeys(METRICS[each].tuned_by for each in self.primaries))

    @property
    def threads(self) -> int:
        """CPU threads of a run; 0: one for each core."""
        return self.configs[self.baseline].train.threads

    @property
    def folds(self) -> int:
        """The folds that replicates go through; 0 for none. All arms see the same images."""
        return self.configs[self.baseline].data.folds

    @functools.cached_property
    def points(self) -> dict[str, list[dict[str, float]]]:
        """The point of each trial of an arm, `[{config path: number}, …]`; [] without ranges.

        The points of a Halton sequence: evenly spread, whatever their number, and with the same
        values in all arms of what is tuned in all.
        """
        from scipy.stats import qmc

        points = {}
        for arm, ranges in self.ranges.items():
            shares = qmc.Halton(max(len(ranges), 1), scramble=False).fast_forward(1)
            drawn = shares.random(self.trials) if ranges else ()
            points[arm] = [
                {path: each.at(float(u)) for (path, each), u in zip(ranges.items(), row)}
                for row in drawn
            ]
        return points

    def config(self, arm: str, seed: int, point: Mapping[str, float] = {}) -> cfg.Config:
        """The config of one run, with what is tuned set to a point."""
        fold = {'data.fold': (seed - self.first_seed) % self.folds} if self.folds else {}
        return cfg.replace(self.configs[arm], {**point, **fold, 'seed': seed})

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, for another process and for the work directory."""
        configs = {arm: cfg.to_flat(config) for arm, config in self.configs.items()}
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        text = json.dumps({**plain, 'configs': configs}, default=dataclasses.asdict)
        return json.loads(text)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> 'Plan':
        """The plan that `to_json` returned."""
        values = {f.name: content.get(f.name, f.default) for f in dataclasses.fields(cls)}
        for name in ('tuning', 'looks', 'primaries'):
            values[name] = tuple(values[name])
        values['configs'] = {
            a: cfg.replace(cfg.Config(), flat) for a, flat in content['configs'].items()
        }
        values['ranges'] = {
            arm: {path: Range(**each) for path, each in ranges.items()}
            for arm, ranges in content['ranges'].items()
        }
        return cls(**values)


# What an experiment file may say of its ablation: arguments of `make_plan`, in capitals.
CONSTANTS = 'SEEDS', 'TUNE', 'TRIALS', 'WIDEN', 'PRIMARIES', 'MARGINS', 'AGAINST', 'FLOOR'
KNOWN = *CONSTANTS, 'ARMS', 'FACTORS', 'REGULARIZERS'


def plan_of(experiment: types.ModuleType, config: cfg.Config, **options: Any) -> Plan:
    """The plan in an experiment file.

    The file has `get_config()` and either `ARMS`, `{name: {config path: value}}`, of which the
    first is the baseline, or `FACTORS`, `{factor: {level: {config path: value}}}`, whose grid
    gives the arms and whose first levels are the baseline; and it may have `CONSTANTS`.

    Args:
        experiment: The loaded file.
        config: Its config with the command line's overrides; arms change it further.
        options: Arguments of `make_plan` that precede the file's.

    Errors:
        UserError: There are no arms, one is not a valid config, or two are the same.
    """
    file = printable(experiment.__file__ or 'the experiment')
    name = printable(Path(experiment.__file__ or 'ablation').stem)
    arms, factors = (getattr(experiment, each, None) for each in ('ARMS', 'FACTORS'))
    if not arms and not factors:
        raise UserError(
            f'{file} is not an ablation: it has neither ARMS nor FACTORS; train it with '
            'launch.train'
        )
    if hasattr(experiment, 'METRIC'):
        raise UserError(f"{file} has METRIC; name PRIMARIES = ('accuracy', 'loss')")
    for other in sorted({each for each in vars(experiment) if each[0].isupper()} - {*KNOWN}):
        if near := nearest(other, KNOWN, cutoff=0.85):
            raise UserError(f'{file} has {other}, which nothing reads{near}')
    constants = {
        constant.lower(): getattr(experiment, constant)
        for constant in CONSTANTS
        if hasattr(experiment, constant)
    }
    return make_plan(
        arms or {},
        config,
        factors=factors,
        name=name,
        question=str(experiment.__doc__ or '').strip(),
        where=f' of {file}',
        **constants | options,
    )


def make_plan(
    arms: Mapping[str, Changes],
    config: cfg.Config,
    *,
    seeds: int = SEEDS,
    until_decided: bool = False,
    tune: Mapping[str, Range] | None = None,
    trials: int | None = None,
    widen: int = 0,
    primaries: tuple[str, ...] = PRIMARIES,
    margins: Mapping[str, float] | None = None,
    against: Mapping[str, str] | None = None,
    factors: Mapping[str, Mapping[str, Changes]] | None = None,
    curves: bool = False,
    floor: bool = True,
    name: str = 'ablation',
    question: str = '',
    where: str = '',
) -> Plan:
    """The plan of these arms, the first of which is the baseline; as `plan_of` for a file.

    Args:
        arms: The changes of each arm to the config, `{name: {config path: value or Range}}`.
        config: The config that the arms change; its seed is the first one.
        seeds: Replicates of each arm.
        until_decided: Whether to add replicates until every arm is decided: looks after `LOOKS`.
        tune: What is tuned in every arm that does not set it itself, `{config path: Range}`.
        trials: Trials of each arm that has a range; None for `TRIALS`.
        widen: The most further trials of an arm whose choice is at the edge of what was tried; each
            goes a step beyond it.
        primaries: The measures to decide on: accuracy, loss, calibration_error or top5.
        margins: δ of a primary; differences within ±δ are equivalence.
        against: The control of an arm, where it is not the baseline.
        factors: A grid in place of `arms`.
        curves: Whether to evaluate runs while they train, every `config.train.eval_every` epochs.
        floor: Whether to train a classifier of pixels beside the arms.
        name, question: Headings of the report.
        where: The place of the arms, for errors.
    """
    levels: dict[str, dict[str, str]] = {}
    if factors:
        if arms:
            raise UserError(f'the ablation{where} has ARMS and FACTORS; leave one of them out')
        _check_table(factors, f'the factors{where} must be {{factor: {{level: changes}}}}')
        for factor, each in factors.items():
            _check_arms(each, f' of factor {factor!r}{where}')
        arms, levels = grid(factors)
    _check_arms(arms, where)
    most = min(MOST_SEEDS, 2**32 - config.seed)
    check_count(seeds, most, f'the seeds{where}')
    asks, trials = trials or widen, TRIALS if trials is None else trials
    check_count(trials, 1000, f'the trials{where}')
    check_count(widen, 1000, f'the trials{where} that widen a range', least=0)
    measures = _measures(primaries, margins, where)
    tune = {} if tune is None else tune
    _check_table(tune, f'what is tuned{where} must be {{config path: log(low, high)}}', Range)
    ranges = {
        arm: {
            **{path: each for path, each in tune.items() if path not in changes},
            **{path: each for path, each in changes.items() if isinstance(each, Range)},
        }
        for arm, changes in arms.items()
    }
    configs = {arm: _arm_config(arm, arms[arm], ranges[arm], config, where) for arm in arms}
    if any(ranges.values()) and not config.data.holds_out:
        raise UserError(
            f'the ablation{where} tunes, for which config.data.validation must hold out images of '
            'the training split; set it, to 500 say'
        )
    if asks and not any(ranges.values()):
        raise UserError(
            f'the ablation{where} has trials, but tunes nothing; leave them out, or give an arm or '
            'TUNE a range, log(1e-4, 1e-2) say'
        )
    for one, other in itertools.combinations(configs, 2):
        if (configs[one], ranges[one]) == (configs[other], ranges[other]):
            raise UserError(f'the arms {one!r} and {other!r}{where} are the same')
    baseline = next(iter(arms))
    against = dict.fromkeys([*arms][1:], baseline) | _controls(against or {}, arms, where)
    return Plan(
        name=name,
        question=question,
        baseline=baseline,
        configs=configs,
        changes={
            arm: {
                p: cfg.get(configs[arm], p) for p, v in changes.items() if not isinstance(v, Range)
            }
            for arm, changes in arms.items()
        },
        ranges=ranges,
        trials=trials,
        finalists=min(FINALISTS, trials),
        tuning=tuple((config.seed + MOST_SEEDS + i) % 2**32 for i in range(TUNING_REPLICATES)),
        looks=tuple(n for n in LOOKS if n <= most) if until_decided else (seeds,),
        first_seed=config.seed,
        primaries=tuple(measures),
        margins=measures,
        against=against,
        factors={f: list(each) for f, each in factors.items()} if factors else None,
        levels=levels,
        curves=curves,
        floor=floor,
        widen=widen,
    )


def check_count(value: Any, most: int, what: str, least: int = 1) -> None:
    """Refuse what is not a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f'{what} are {value!r}; give a number from {least} to {most:,}')


def _measures(primaries: Any, margins: Any, where: str) -> dict[str, float]:
    """The margin of each primary measure."""
    margins = {} if margins is None else margins
    _check_table(margins, f'the margins{where} must be {{measure: number}}')
    if isinstance(primaries, str) and primaries in METRICS:
        primaries = [primaries]
    for measure in (*primaries, *margins) if isinstance(primaries, (list, tuple)) else [primaries]:
        if not isinstance(measure, str) or measure not in METRICS:
            near = nearest(str(measure), METRICS)
            raise UserError(
                f'the measures{where} name {measure!r}; they can be {", ".join(METRICS)}{near}'
            )
    if unused := set(margins) - set(primaries):
        raise UserError(f'the margins{where} name {unused.pop()!r}, which is not a primary measure')
    if not primaries:
        raise UserError(f'the primary measures{where} are none; name accuracy, say')
    chosen = {each: margins.get(each, METRICS[each].margin) for each in primaries}
    for each, margin in chosen.items():
        if not isinstance(margin, (int, float)) or not 0 <= margin < 1e300:
            raise UserError(
                f'the margin of {each}{where} is {margin!r}; give a number of at least 0'
            )
    return {each: float(margin) for each, margin in chosen.items()}


def _controls(against: Any, arms: Any, where: str) -> dict[str, str]:
    """The controls that are not the baseline, the first arm."""
    _check_table(against, f'AGAINST{where} must be {{arm: control}}', str)
    for arm, control in against.items():
        for each in (arm, control):
            if each not in arms:
                near = nearest(str(each), arms)
                raise UserError(f'AGAINST{where} names {each!r}, which is not an arm{near}')
        if arm in (control, next(iter(arms))):
            raise UserError(f'AGAINST{where} compares {arm!r} with none')
    return dict(against)


def _check_table(value: Any, message: str, kind: type = object) -> None:
    """Refuse what is not a mapping from text to values of a kind."""
    if not (
        isinstance(value, Mapping)
        and all(isinstance(name, str) and isinstance(each, kind) for name, each in value.items())
    ):
        raise UserError(message)


def _arm_config(
    arm: str, changes: Changes, ranges: Mapping[str, Range], config: cfg.Config, where: str
) -> cfg.Config:
    """The config of an arm, whose runs must see the same images as those of other arms."""
    try:
        for share in (0.0, 1.0, 0.5):
            tuned = {path: each.at(share) for path, each in ranges.items()}
            changed = cfg.validate(cfg.replace(config, {**changes, **tuned}))
        fields = cfg.fields_by_path(config)
        for path in ranges:
            if not fields[path].metadata.get('traced'):
                raise UserError(f'config.{path} is not a number that can be tuned; give it a value')
    except UserError as error:
        raise UserError(f'arm {arm!r}{where}: {error}') from error
    for path in (*changes, *ranges):
        free = 'data.batch', 'data.balance'
        if path == 'seed' or (path.startswith('data.') and path not in free):
            raise UserError(
                f'arm {arm!r}{where} changes config.{path}; all arms must see the same images and '
                'have the same seeds; only config.data.batch and balance may differ'
            )
    if changed.train.patience and not changed.data.holds_out:
        raise UserError(
            f'arm {arm!r}{where} stops early (config.train.patience), for which '
            'config.data.validation must hold out images of the training split; set it, to 500 say'
        )
    return changed


def _check_arms(arms: Any, where: str) -> None:
    """Refuse arms of another form, and names that cannot be printed."""
    if not isinstance(arms, Mapping) or not arms:
        raise UserError(f'the arms{where} must be {{name: {{config path: value}}}}')
    for arm, changes in arms.items():
        if not isinstance(arm, str) or not arm.strip() or printable(arm) != arm:
            raise UserError(f'arm {arm!r}{where} needs a name of characters that can be printed')
        form = f'arm {arm!r}{where} is {changes!r}; it must be {{config path: value}}'
        _check_table(changes, form)


def grid(
    factors: Mapping[str, Mapping[str, Changes]],
) -> tuple[dict[str, Changes], dict[str, dict[str, str]]]:
    """The arms of a full factorial design and their levels; the first arm has all first levels."""
    arms, levels = {}, {}
    for combination in itertools.product(*(factor.items() for factor in factors.values())):
        name = ', '.join(level for level, _ in combination)
        if name in arms:
            raise UserError(f'two arms of the factors are named {name!r}; rename a level')
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
    """The training budget of an arm on so many images, in words."""
    epochs = config.train.epochs + config.unfreeze.epochs
    steps = cfg.phase_ends(config, examples)[-1]
    notes = cfg.averaging_notes(config, steps)
    text = f'{epochs:g} epochs of {examples:,} images = {steps:,} steps of {config.data.batch}'
    return '; note: '.join([text, *notes])


def code_digest() -> str:
    """SHA-256 of the source files that a result depends on: all but the analysis."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob('*') if p.suffix in ('.py', '.cc', '.h')):
        relative = path.relative_to(root).as_posix()
        if not relative.startswith('ablation/') or relative in TRAINING:
            total.update(relative.encode() + b'\0' + path.read_bytes() + b'\0')
    return total.hexdigest()
