"""The ledger: which cells are done. A cell is one arm with one seed.

A result is a file that appears whole, named by the arm, the seed and a digest of all that it
depends on. A cell is claimed by a lock that the operating system lets go of when its process
ends, however it ends; so a killed run repeats exactly the cells that were not finished, and two
runs on one folder never do the same cell at once.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import Plan
from cnn_jax.errors import UserError
from cnn_jax.files import Corrupt, lock, lock_holder, read_json, write_json, write_text

DEFINITION = 'ablation.json'


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, and the file of its result."""

    arm: str
    seed: int
    path: Path

    def status(self) -> str:
        """`done`, `failed` or `missing`."""
        return self.result()['status'] if self.path.exists() else 'missing'

    def result(self) -> dict[str, Any]:
        """What was found, as `read` reads it."""
        return read(self.path)


@dataclass(frozen=True)
class Ledger:
    """The cells of an ablation in its work directory.

    Attributes:
        folder: The work directory.
        plan: What is compared.
        identity: What every result depends on besides its config: `code`, `data`, `jaxlib`, ….
    """

    folder: Path
    plan: Plan
    identity: dict[str, str]

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that early results compare all arms."""
        return self._cells

    @functools.cached_property
    def _cells(self) -> list[Cell]:
        return [self._cell(arm, seed) for seed in self.plan.seeds for arm in self.plan.configs]

    def definition(self) -> dict[str, Any]:
        """What `open_ledger` wrote down of the ablation."""
        return read(self.folder / DEFINITION)

    def missing(self) -> list[Cell]:
        """The cells without a result."""
        return [cell for cell in self.cells() if not cell.path.exists()]

    def running(self) -> list[Cell]:
        """The cells without a result that a process has claimed, as far as `lock_holder` sees."""
        return [cell for cell in self.missing() if lock_holder(self._lock(cell))]

    def _lock(self, cell: Cell) -> Path:
        return self.folder / 'locks' / f'{cell.path.stem}.lock'

    def _cell(self, arm: str, seed: int) -> Cell:
        facts = {'config': cfg.content_hash(self.plan.cell_config(arm, seed)), **self.identity}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        word = re.sub(r'[^A-Za-z0-9.]+', '-', arm).strip('-') or 'arm'
        return Cell(arm, seed, self.folder / 'cells' / f'{word}-{seed}-{key[:16]}.json')

    def write(self, cell: Cell, result: dict[str, Any]) -> None:
        """Record the result of a cell."""
        write_json(cell.path, {'arm': cell.arm, 'seed': cell.seed, **result})

    def forget_failed(self) -> None:
        """Set the results of failed cells aside, so that they run again."""
        for cell in self.cells():
            if cell.status() == 'failed':
                cell.path.rename(cell.path.with_suffix('.failed'))

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether this process has the cell to itself and it is still to be done.

        The lock lasts as long as the context, or the process.
        """
        with lock(self._lock(cell)) as held:
            yield held and not cell.path.exists()


def open_ledger(
    folder: Path, plan: Plan, identity: dict[str, str], facts: dict[str, Any]
) -> Ledger:
    """Begin an ablation in a work directory, or go on with the one that is there.

    Args:
        folder: The work directory.
        plan: What is compared.
        identity: As in `Ledger`.
        facts: For the report: `command`, `manifest` and `budgets`.

    Errors:
        UserError: The folder holds an ablation with other arms, configs, data or code (the
            difference is told), or cells of one whose definition is gone: results of both would
            be mixed.
    """
    with lock(folder / 'locks' / f'{DEFINITION}.lock', wait=True):
        return _open_ledger(folder, plan, identity, facts)


def _open_ledger(
    folder: Path, plan: Plan, identity: dict[str, str], facts: dict[str, Any]
) -> Ledger:
    definition = {
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
        'identity': identity,
    }
    path = folder / DEFINITION
    now = json.loads(json.dumps(definition))
    if path.exists():
        before = read(path)
        if changed := _differences(before, now):
            raise UserError(
                f'{folder} holds an ablation that differs from this one: {"; ".join(changed)}. '
                'Choose another --workdir; results are never mixed'
            )
        # No result depends on what else may be new: seeds, metric, baseline, the question.
        now['seeds'] = sorted({*before['seeds'], *now['seeds']})
        if all(before.get(name) == content for name, content in now.items()):
            return Ledger(folder, plan, identity)
        facts = before | {'command': facts['command']}
    elif any((folder / 'cells').glob('*.json')):
        raise UserError(
            f'{folder} has the cells of an ablation, but its {DEFINITION} is gone: which they are '
            'cannot be told; restore it or choose another --workdir'
        )
    write_text(path, json.dumps(facts | now, indent=2) + '\n')
    return Ledger(folder, plan, identity)


def read_ledger(folder: Path, plan: Plan) -> Ledger | None:
    """The ledger that a process which runs cells has opened in a work directory, if one has."""
    path = folder / DEFINITION
    if not path.exists():
        return None
    return Ledger(folder, plan, read(path)['identity'])


def read(path: Path) -> dict[str, Any]:
    """The definition of an ablation, or the result of a cell.

    Errors:
        UserError: The file is damaged.
    """
    try:
        return read_json(path)
    except Corrupt as error:
        mend = 'restore it' if path.name == DEFINITION else 'remove it and run launch.ablate again'
        raise UserError(f'{path} is damaged ({error}); {mend}') from error


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes the results of two definitions incomparable; more seeds do not."""
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
