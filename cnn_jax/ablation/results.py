"""The results of an ablation on disk. A run is one arm with one seed.

A result is a file that appears whole, named by the arm, the seed and a digest of all that it
depends on. A run is claimed by a lock that the operating system releases when its process ends,
however it ends; so a killed ablation repeats exactly the runs that were not finished, and two
processes on one folder never do the same run at once.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import MOST_SEEDS, Plan
from cnn_jax.errors import UserError, printable
from cnn_jax.files import Corrupt, lock, read_json, write_json

DEFINITION = 'ablation.json'
FOLDER = 'cells'

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
    """One arm with one seed, and the file of its result."""

    arm: str
    seed: int
    path: Path

    def result(self) -> Result:
        """The result, as `read` reads it."""
        return read(self.path)


@dataclass(frozen=True)
class Store:
    """The runs of an ablation in its work directory."""

    folder: Path
    plan: Plan
    provenance: dict[str, str]  # what results depend on besides the config: `code`, `jaxlib`, …

    @functools.cached_property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that early results compare all arms."""
        return [self._run(arm, seed) for seed in self.plan.seeds for arm in self.plan.configs]

    def _run(self, arm: str, seed: int) -> Run:
        facts = {'config': cfg.content_hash(self.plan.config(arm, seed)), **self.provenance}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        word = re.sub(r'[^A-Za-z0-9.]+', '-', arm).strip('-')[:60] or 'arm'
        return Run(arm, seed, self.folder / FOLDER / f'{word}-{seed}-{key[:16]}.json')

    def definition(self) -> dict[str, Any]:
        """The definition that `open_store` wrote."""
        return read(self.folder / DEFINITION)

    def missing(self) -> list[Run]:
        """The runs without a result."""
        return [run for run in self.runs if not run.path.exists()]

    def _lock(self, run: Run) -> Path:
        return self.folder / 'locks' / f'{run.path.stem}.lock'

    def write(self, run: Run, result: Result) -> None:
        """Record the result of a run."""
        write_json(run.path, {'arm': run.arm, 'seed': run.seed, **result})

    def retry_failed(self) -> None:
        """Set the results of failed runs aside, so that they run again."""
        for run in self.runs:
            if run.path.exists() and _why_unusable(run.result(), self.plan.metric):
                run.path.rename(run.path.with_suffix('.failed'))

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Claim a run; true if this process has it to itself and it is still to be done.

        The lock lasts as long as the context, or the process.
        """
        with lock(self._lock(run)) as mine:
            yield mine and not run.path.exists()


def refuse_links(folder: Path) -> None:
    """Refuse a work directory with a folder that is a link: it could make us write anywhere."""
    for name in (FOLDER, 'locks', 'logs', 'figures'):
        if (folder / name).is_symlink():
            raise UserError(f'{folder / name} is a link; nothing is written through it, remove it')


def open_store(
    folder: Path, plan: Plan, provenance: dict[str, str], facts: dict[str, Any]
) -> Store:
    """Begin an ablation in a work directory, or resume the one that is there.

    Args:
        folder, plan, provenance: As in `Store`.
        facts: Facts for the report: `command`, `manifest` and `budgets`.

    Errors:
        UserError: The folder holds an ablation with other arms, configs, data or code (the
            difference is named), or results whose definition is gone: they would be mixed.
    """
    now = json.loads(json.dumps(_definition(plan, provenance)))
    path = folder / DEFINITION
    with lock(folder / 'locks' / f'{DEFINITION}.lock', wait=True):
        if path.exists():
            before = read(path)
            if changed := _differences(before, now):
                raise UserError(
                    f'{folder} holds an ablation that differs from this one: '
                    f'{"; ".join(changed)}. Choose another --workdir; results are never mixed'
                )
            # No result depends on what else may be new: seeds, metric, baseline, the question.
            now['seeds'] = sorted({*before['seeds'], *now['seeds']})
            if all(before.get(name) == content for name, content in now.items()):
                return Store(folder, plan, provenance)
            facts = before | {'command': facts['command']}
        elif any((folder / FOLDER).glob('*.json')):
            raise UserError(
                f'{folder} has results of an ablation, but its {DEFINITION} is missing; restore it '
                'or choose another --workdir'
            )
        write_json(path, facts | now, indent=2)
    return Store(folder, plan, provenance)


def read_store(folder: Path, plan: Plan) -> Store | None:
    """The store that a process which trains has opened in a work directory, if one has."""
    path = folder / DEFINITION
    return Store(folder, plan, read(path)['identity']) if path.exists() else None


def _definition(plan: Plan, provenance: dict[str, str]) -> dict[str, Any]:
    return {
        'name': plan.name,
        'question': plan.question,
        'baseline': plan.baseline,
        'metric': plan.metric,
        'seeds': list(plan.seeds),
        'arms': {
            arm: {'changes': plan.changes[arm], 'levels': plan.levels.get(arm)}
            for arm in plan.configs
        },
        'factors': plan.factors,
        'configs': {arm: cfg.to_flat(config) for arm, config in plan.configs.items()},
        'identity': provenance,
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences that make the results of two definitions incomparable."""
    changed = []
    for part in ('configs', 'identity'):
        old, new = before[part], now[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name):
                continue
            if name not in old or name not in new:
                changed.append(f'{part[:-1]} {name!r} is only {"there" if name in old else "here"}')
            elif part == 'identity':
                changed.append(f'{name}: {str(old[name])[:16]} → {str(new[name])[:16]}')
            else:
                fields = [
                    f'{field}: {old[name].get(field)!r} → {new[name].get(field)!r}'
                    for field in new[name]
                    if old[name].get(field) != new[name].get(field)
                ]
                changed.append(f'arm {name!r}: {", ".join(fields)}')
    return changed


@dataclass(frozen=True)
class Results:
    """The definition of an ablation and the results of its runs."""

    definition: dict[str, Any]  # `ablation.json`
    done: dict[tuple[str, int], Result]  # usable results, in the order of the plan
    failed: list[dict[str, Any]]  # runs without a usable result: `arm`, `seed`, `reason`
    missing: list[dict[str, Any]]  # runs that have not finished: `arm`, `seed`
    unplanned: int  # results on disk that belong to no arm and seed of the plan

    def of_arm(self, arm: str) -> dict[int, Result]:
        """The usable results of an arm, by seed."""
        return {seed: result for (name, seed), result in self.done.items() if name == arm}


def read_results(folder: Path) -> Results:
    """Read the work directory of an ablation.

    Errors:
        UserError: The folder holds no ablation, or a file in it is damaged.
    """
    path = folder / DEFINITION
    if not path.exists():
        raise UserError(
            f'{folder} is not the work directory of an ablation (it has no {DEFINITION}); '
            'give the --workdir that launch.ablate was given'
        )
    definition = read(path)
    if not 0 < len(definition['seeds']) <= MOST_SEEDS:
        raise UserError(f'{path} has {len(definition["seeds"]):,} seeds, not 1 to {MOST_SEEDS:,}')
    if definition['baseline'] not in definition['arms']:
        raise UserError(f'{path} has no arm {printable(definition["baseline"])}, its baseline')
    if wrong := [arm for arm in definition['arms'] if printable(arm) != arm]:
        raise UserError(f'{path} names an arm {wrong[0]!r}, which cannot be printed')
    found = [read(each) for each in sorted((folder / FOLDER).glob('*.json'))]
    by_run = {(result['arm'], result['seed']): result for result in found}
    if len(by_run) < len(found):
        raise UserError(
            f'{folder}/{FOLDER} has several results of one arm and seed, which cannot be told '
            'apart; choose another --workdir'
        )
    plan = [(arm, seed) for arm in definition['arms'] for seed in definition['seeds']]
    done, failed, missing = {}, [], []
    for arm, seed in plan:
        run = {'arm': arm, 'seed': seed}
        result = by_run.get((arm, seed))
        if result is None:
            missing.append(run)
        elif reason := _why_unusable(result, definition['metric']):
            failed.append({**run, 'reason': reason})
        else:
            done[arm, seed] = result
    return Results(definition, done, failed, missing, len(by_run.keys() - set(plan)))


def _why_unusable(result: Result, metric: str) -> str:
    if result['status'] != 'done':
        return result.get('reason') or 'no reason was recorded'
    number = result['metrics']['eval'].get(metric)
    if number is None or not math.isfinite(number):
        return f'the evaluation {metric} is {number}, not a finite number'
    return ''
