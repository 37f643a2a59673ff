"""The results of an ablation on disk.

A result is a file that appears whole, named by the arm, the seed and a digest of all that it
depends on. A run is claimed by a lock that the operating system releases when its process ends,
however it ends; so a killed ablation repeats exactly the runs that were not finished, and two
processes on one folder never do the same run at once.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import METRICS, MOST_SEEDS, Plan, Range
from cnn_jax.errors import UserError, printable
from cnn_jax.files import Corrupt, lock, read_json, write_json

DEFINITION = 'ablation.json'
FOLDER = 'cells'
FORMAT = 3  # of the definition
FLOOR = 'SVM on pixels'
AGAIN = 'once more'  # the baseline's first replicate

Result = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The definition of an ablation, or the result of a run.

    Errors:
        UserError: The file is damaged, or cannot be read.
    """
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    except Corrupt as error:
        mend = 'restore it' if path.name == DEFINITION else 'remove it and run launch.ablate again'
        raise UserError(f'{path} is damaged ({error}); {mend}') from error


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Refuse files that carry their digests but do not hold what `launch.ablate` writes."""
    try:
        with np.errstate(all='ignore'):  # what is not finite is shown as missing
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'{folder} holds an ablation that launch.ablate did not write '
            f'({type(error).__name__}: {error}; --debug shows where)'
        ) from error


@dataclass(frozen=True)
class Run:
    """A run of an arm with one seed."""

    # `trial`, judged on the held-out images; `replicate`, judged on the test images; `FLOOR` and
    # `AGAIN`, the controls.
    kind: str
    arm: str
    seed: int
    trial: int  # where what is tuned stands, as the number of the point; −1 if nothing is
    path: Path  # the file of its result
    point: dict[str, float] = field(compare=False)  # what is tuned there, {config path: number}
    config: cfg.Config = field(compare=False)

    @property
    def label(self) -> dict[str, Any]:
        """The facts by which its file names the run."""
        return {'kind': self.kind, 'arm': self.arm, 'seed': self.seed, 'trial': self.trial}


@dataclass(frozen=True)
class Choice:
    """The choice of the trials of an arm by one measure."""

    point: dict[str, float]  # the values, {config path: number}
    trial: int  # its number
    at_edge: list[str]  # the paths whose value is the smallest or largest one tried
    # The mean of the measure on the held-out images over each trial's replicates; None where one
    # has failed.
    values: list[float | None]


@dataclass(frozen=True)
class Store:
    """The runs of an ablation in its work directory, and what has been found out about them."""

    folder: Path
    plan: Plan
    provenance: dict[str, str]  # what results depend on besides the config: `code`, `jaxlib`, …
    # The arms that each look has left undecided; filled by `decisions.replicates`.
    undecided: dict[int, list[str]] = field(default_factory=dict, init=False)
    _results: dict[Run, Result] = field(default_factory=dict, init=False)
    _choices: dict[tuple[str, str], Choice] = field(default_factory=dict, init=False)
    _runs: dict[tuple, Run] = field(default_factory=dict, init=False)

    def result(self, run: Run) -> Result | None:
        """The result of a run, once there is one.

        Errors:
            UserError: Its file is damaged, or another run's.
        """
        if run not in self._results:
            if not run.path.exists():
                return None
            found = read(run.path)
            # By its point: trials that widen a range are numbered anew where there are more. An
            # earlier version wrote the number alone.
            wanted = run.label | {'tuned': run.point}
            del wanted['trial' if 'tuned' in found else 'tuned']
            if {name: found.get(name) for name in wanted} != wanted:
                raise UserError(
                    f'{run.path} holds the result of another run ({printable(found.get("arm"))}, '
                    f'seed {found.get("seed")}); remove it and run launch.ablate again'
                )
            self._results[run] = found
        return self._results[run]

    def run(self, kind: str, arm: str, seed: int, trial: int = -1, point: Any = ()) -> Run:
        """The run of an arm with this seed and what is tuned at this point."""
        key = (kind, arm, seed, trial, *sorted(dict(point).items()))
        if key not in self._runs:
            point = dict(point)
            config = self.plan.config(arm, seed, point)
            curves = self.plan.curves and kind == 'replicate'
            facts = {'config': cfg.content_hash(config), 'kind': kind, **self.provenance}
            facts |= {'curves': True} if curves else {}
            digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
            word = _word(arm)
            if [_word(each) for each in self.plan.configs].count(word) > 1:
                word += '-' + hashlib.sha256(arm.encode()).hexdigest()[:8]
            mark = {'trial': f'trial{trial}-', 'replicate': ''}.get(kind, f'{kind[:3]}-'.lower())
            name = f'{word}-{mark}{seed}-{digest[:16]}.json'
            path = self.folder / FOLDER / name
            self._runs[key] = Run(kind, arm, seed, trial, path, point, config)
        return self._runs[key]

    def points(self, arm: str) -> list[dict[str, float]]:
        """The points of an arm's trials: the plan's, then those that widen its ranges."""
        points = [*self.plan.points[arm]]
        for _ in range(self.plan.widen):
            beyond = [self._beyond(arm, judge, points) for judge in self.plan.judges]
            points += [*filter(None, beyond)][:1]
        return points

    def _beyond(
        self, arm: str, judge: str, points: list[dict[str, float]]
    ) -> dict[str, float] | None:
        """The choice, moved beyond the edge that it is at; None if it is at none that can move."""
        if not (choice := self._choose(arm, judge, points)):
            return None
        for path in choice.at_edge:
            tried = {point[path] for point in points}
            if len(tried) > 1:
                further = self.plan.ranges[arm][path].beyond(tried, choice.point[path])
                with suppress(UserError):  # the field has no such value
                    cfg.validate(cfg.replace(self.plan.configs[arm], {path: further}))
                    return {**choice.point, path: further}
        return None

    def trials(self, arm: str) -> list[list[Run]]:
        """The runs of each trial of an arm: its first replicate, and of the finalists all.

        One replicate tells the bad points, which are most, but not the best from the second best,
        nor a rate that fails now and then.
        """
        return self._trials(arm, self.points(arm))

    def _trials(self, arm: str, points: list[dict[str, float]]) -> list[list[Run]]:
        seeds = self.plan.tuning
        finalists = {n for judge in self.plan.judges for n in self._finalists(arm, judge, points)}
        return [
            [
                self.run('trial', arm, seed, number, point)
                for seed in (seeds if number in finalists else seeds[:1])
            ]
            for number, point in enumerate(points)
        ]

    def _finalists(self, arm: str, judge: str, points: list[dict[str, float]]) -> set[int]:
        """The trials whose first replicates are the best, and those that widen a range.

        None until the plan's have finished.
        """
        plan, values = self.plan, []
        if plan.finalists >= plan.trials:
            return {*range(len(points))}
        for number, point in enumerate(plan.points[arm]):
            result = self.result(self.run('trial', arm, plan.tuning[0], number, point))
            if result is None:
                return set()
            values.append(value_of(result, 'validation', judge))
        best = ranked(values, METRICS[judge].sign)[: plan.finalists]
        return {*best, *range(plan.trials, len(points))}

    def choice(self, arm: str, measure: str) -> Choice | None:
        """The choice of an arm for a measure: the finalist of the best mean.

        Accuracy and loss each have a choice of their own (top-5 accuracy follows the former, the
        calibration error the latter): the rate of the least loss is seldom that of the highest
        accuracy, and an arm that is tuned for one alone would be unfairly judged by the other.
        None until all trials have finished. A trial that failed is not chosen.
        """
        judge = METRICS[measure].tuned_by
        key = arm, judge if judge in self.plan.judges else self.plan.judges[0]
        if key not in self._choices and (choice := self._choose(*key, self.points(arm))):
            self._choices[key] = choice
        return self._choices.get(key)

    def _choose(self, arm: str, judge: str, points: list[dict[str, float]]) -> Choice | None:
        finalists, values = self._finalists(arm, judge, points), []
        if not points:
            return Choice({}, -1, [], [])
        for runs in self._trials(arm, points):
            results = [self.result(run) for run in runs]
            if not finalists or not all(results):
                return None
            found = [value_of(each, 'validation', judge) for each in results if each]
            known = [each for each in found if each is not None]
            values.append(float(np.mean(known)) if len(known) == len(found) else None)
        judged = [value if n in finalists else None for n, value in enumerate(values)]
        if all(value is None for value in judged):  # every finalist has failed
            judged = values
        choice = chosen(points, judged, METRICS[judge].sign)
        return dataclasses.replace(choice, values=values)

    def replicate(self, arm: str, number: int, measure: str) -> Run | None:
        """The run that a measure of a replicate is read off; None before all trials have ended."""
        choice = self.choice(arm, measure)
        seed = self.plan.seeds[number]
        return choice and self.run('replicate', arm, seed, choice.trial, choice.point)

    def replicates(self, arm: str, number: int) -> list[Run]:
        """The runs of a replicate: one where all measures have chosen the same; [] if not yet."""
        runs = [self.replicate(arm, number, measure) for measure in self.plan.judges]
        return [*dict.fromkeys(run for run in runs if run)]

    def definition(self) -> dict[str, Any]:
        """The definition that `open_store` wrote."""
        return read(self.folder / DEFINITION)

    def write(self, run: Run, result: Result) -> None:
        """Record the result of a run."""
        write_json(run.path, {**run.label, 'tuned': run.point, **result})

    def retry_failed(self) -> None:
        """Set the results of failed runs aside, so that they run again."""
        for path in (self.folder / FOLDER).glob('*.json'):
            if why_failed(read(path)):
                path.rename(path.with_suffix('.failed'))

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Claim a run; true if this process has it to itself and it is still to be done.

        The lock lasts as long as the context, or the process.
        """
        with lock(self.folder / 'locks' / f'{run.path.stem}.lock') as mine:
            yield mine and not run.path.exists()


def _word(arm: str) -> str:
    """An arm in the name of a file."""
    return re.sub(r'[^A-Za-z0-9.]+', '-', arm).strip('-')[:60] or 'arm'


def ranked(values: list[float | None], sign: int) -> list[int]:
    """The positions of the values, best first (sign 1: the highest), what has failed last."""
    costs = [math.inf if value is None else -sign * value for value in values]
    return np.argsort(costs, kind='stable').tolist()


def chosen(points: list[dict[str, float]], values: list[float | None], sign: int = -1) -> Choice:
    """The choice of the point with the best value: the highest with sign 1."""
    best = ranked(values, sign)[0]
    at_edge = [
        path
        for path, value in points[best].items()
        if value in (min(p[path] for p in points), max(p[path] for p in points))
    ]
    return Choice(points[best], best, at_edge, values)


def value_of(result: Result, split: str, measure: str) -> float | None:
    """A measure of a run on a split; None of a failed one, or where it is not a possible number."""
    value = None if why_failed(result) else result['metrics'][split].get(measure)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value if 0 <= value <= METRICS[measure].most else None


def why_failed(result: Result) -> str:
    """The reason for which a run has no numbers, or ''."""
    if result['status'] != 'done':
        return result.get('reason') or 'no reason was recorded'
    return ''


def refuse_links(folder: Path) -> None:
    """Refuse a work directory with a folder that is a link: it could make us write anywhere."""
    for name in (FOLDER, 'locks', 'logs', 'figures'):
        if (folder / name).is_symlink():
            raise UserError(f'{folder / name} is a link; nothing is written through it, remove it')


def open_store(
    folder: Path, plan: Plan, provenance: dict[str, str], facts: dict[str, Any]
) -> Store:
    """Begin an ablation in a work directory, or resume the one that is there, as `extended`.

    Args:
        folder, plan, provenance: As in `Store`.
        facts: Facts for the report: `command`, `manifest` and `budgets`.

    Errors:
        UserError: The folder holds an ablation with other arms, configs, data or code (the
            difference is named), or results whose definition is gone: they would be mixed.
    """
    path = folder / DEFINITION
    with lock(folder / 'locks' / f'{DEFINITION}.lock', wait=True):
        if path.exists():
            before, old = _stored(path)
            if changed := _differences(old, plan, before['identity'], provenance):
                raise UserError(
                    f'{folder} holds an ablation that differs from this one: '
                    f'{"; ".join(changed)}. Choose another --workdir; results are never mixed'
                )
            plan = extended(old, plan)
            if plan.to_json() == before['plan']:
                return Store(folder, plan, provenance)
            facts = before | {'command': facts['command']}
        elif any((folder / FOLDER).glob('*.json')):
            raise UserError(
                f'{folder} has results of an ablation, but its {DEFINITION} is missing; restore it '
                'or choose another --workdir'
            )
        defined = {'format': FORMAT, 'plan': plan.to_json(), 'identity': provenance}
        write_json(path, facts | defined, indent=2)
    return Store(folder, plan, provenance)


def extended(old: Plan, new: Plan) -> Plan:
    """The new plan of a study that has followed the old one: its looks come after the old ones.

    So the replicates that there are count, whether more are asked for or fewer; only a single one,
    which nothing can be said of, is no look.
    """
    looks = (*old.looks, *(n for n in new.looks if n > old.looks[-1]))
    return dataclasses.replace(new, looks=tuple(n for n in looks if n > 1) or looks)


def read_store(folder: Path) -> Store:
    """The ablation in a work directory.

    Errors:
        UserError: The folder holds none, or a file in it is damaged.
    """
    path = folder / DEFINITION
    if not path.exists():
        raise UserError(
            f'{folder} is not the work directory of an ablation (it has no {DEFINITION}); '
            'give the --workdir that launch.ablate was given'
        )
    cells = folder / FOLDER
    if cells.exists() and not cells.is_dir():
        raise UserError(f'{cells} is not a folder; restore it')
    with understood(folder):
        definition, plan = _stored(path)
        if not 0 < plan.looks[-1] <= MOST_SEEDS:
            raise UserError(f'{path} has {plan.looks[-1]:,} replicates, not 1 to {MOST_SEEDS:,}')
        if plan.baseline not in plan.configs:
            raise UserError(f'{path} has no arm {printable(plan.baseline)}, its baseline')
        if wrong := [arm for arm in plan.configs if printable(arm) != arm]:
            raise UserError(f'{path} names an arm {wrong[0]!r}, which cannot be printed')
        return Store(folder, plan, definition['identity'])


def _stored(path: Path) -> tuple[dict[str, Any], Plan]:
    definition = read(path)
    if definition.get('format') != FORMAT:
        raise UserError(
            f'{path} was written by another version of this package; choose another --workdir'
        )
    return definition, Plan.from_json(definition['plan'])


def _differences(old: Plan, new: Plan, before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The differences that make the results of two ablations incomparable."""
    changed = [
        f'{name}: {str(before.get(name))[:16]} → {str(now.get(name))[:16]}'
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if old.first_seed != new.first_seed:
        changed.append(f'seed: {old.first_seed} → {new.first_seed}')
    for arm in sorted(old.configs.keys() | new.configs.keys()):
        if arm not in old.configs or arm not in new.configs:
            changed.append(f'arm {arm!r} is only {"there" if arm in old.configs else "here"}')
            continue
        fields = cfg.differences(old.configs[arm], new.configs[arm])
        tuned: dict[str, Range] = old.ranges[arm] | new.ranges[arm]
        told = [f'{path}: {a!r} → {b!r}' for path, (a, b) in fields.items() if path not in tuned]
        if told:
            changed.append(f'arm {arm!r}: {", ".join(told)}')
    return changed
