"""What an ablation has left on disk: its definition and the results of its cells."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax.ablation.ledger import read
from cnn_jax.errors import UserError

Cell = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The definition of an ablation and what is known of its cells.

    Attributes:
        ablation: `ablation.json`.
        cells: Finished cells by (arm, seed), in the order of the plan.
        failed: Cells without a usable result: `arm`, `seed`, `reason`.
        missing: Cells that have not run: `arm`, `seed`.
        unplanned: Number of cells on disk that belong to no arm and seed of the plan.
    """

    ablation: dict[str, Any]
    cells: dict[tuple[str, int], Cell]
    failed: list[dict[str, Any]]
    missing: list[dict[str, Any]]
    unplanned: int

    def of_arm(self, arm: str) -> dict[int, Cell]:
        """The finished cells of an arm, by seed."""
        return {seed: cell for (name, seed), cell in self.cells.items() if name == arm}


def read_results(folder: Path) -> Results:
    """Read the work directory of an ablation.

    Errors:
        UserError: The folder holds no ablation, or a file in it is damaged.
    """
    path = folder / 'ablation.json'
    if not path.exists():
        raise UserError(
            f'{folder} is not the work directory of an ablation (it has no ablation.json); '
            'give the --workdir that launch.ablate was given'
        )
    ablation = read(path)
    found = [read(path) for path in sorted((folder / 'cells').glob('*.json'))]
    by_place = {(cell['arm'], cell['seed']): cell for cell in found}
    if len(by_place) < len(found):
        raise UserError(
            f'{folder}/cells has several results of one arm and seed, which cannot be told apart; '
            'choose another --workdir'
        )
    plan = [(arm, seed) for arm in ablation['arms'] for seed in ablation['seeds']]
    cells, failed, missing = {}, [], []
    for arm, seed in plan:
        place = {'arm': arm, 'seed': seed}
        cell = by_place.get((arm, seed))
        if cell is None:
            missing.append(place)
        elif reason := _why_unusable(cell, ablation['metric']):
            failed.append({**place, 'reason': reason})
        else:
            cells[arm, seed] = cell
    unplanned = len(by_place.keys() - set(plan))
    return Results(ablation, cells, failed, missing, unplanned)


def _why_unusable(cell: Cell, metric: str) -> str:
    if cell['status'] != 'done':
        return cell.get('reason') or 'no reason was recorded'
    number = cell['metrics']['eval'].get(metric)
    if number is None or not math.isfinite(number):
        return f'the evaluation {metric} is {number}, not a finite number'
    return ''
