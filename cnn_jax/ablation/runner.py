"""Running the cells of a ledger, in this process."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from cnn_jax.ablation.cell import train_cells
from cnn_jax.ablation.compiled import Compiled, compile_structure
from cnn_jax.ablation.ledger import Cell, Ledger
from cnn_jax.ablation.plan import by_structure

Tell = Callable[[Cell, dict[str, Any]], object]

OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'  # in XLA's message
PATIENCE = 0.5  # seconds between looks at cells that other processes have


def run_cells(
    ledger: Ledger,
    description: dict[str, Any],
    train,
    evaluation,
    *,
    tell: Tell = lambda *_: None,
    start: int = 0,
    together: int = 1,
) -> dict[str, int]:
    """Run every cell that no other process has, until all have a result.

    Cells of one structure follow each other and share one compilation. A cell that another
    process has claimed is waited for, and taken over if that process dies.

    Args:
        ledger: Of the ablation.
        description: Of the data, as `train.setup.describe` gives it, with `preprocessing`.
        train, evaluation: The opened batches of both splits.
        tell: Called with each cell and its result.
        start: Number of the structure to begin with, so that several workers begin with
            different ones.
        together: The most cells that are trained together; fewer where memory is short.

    Returns:
        Cells done here and compilations of the training step.
    """
    groups = by_structure(ledger.plan)
    shift = start % len(groups)
    structures = [
        _Structure(ledger, arms, (description, train, evaluation), together)
        for arms in groups[shift:] + groups[:shift]
    ]
    done = 0
    while ledger.missing():
        before = done
        for structure in structures:
            while results := structure.run_some():
                done += len(results)
                for cell, result in results:
                    tell(cell, result)
        if done == before:
            time.sleep(PATIENCE)
    return {'cells': done, 'compilations': sum(s.compilations() for s in structures)}


class _Structure:
    """The arms that share one compilation."""

    def __init__(self, ledger: Ledger, arms: list[str], data: tuple, together: int):
        self._ledger, self._arms, self._data = ledger, arms, data
        self._together = together
        self._compiled: Compiled | None = None
        self._past = 0

    def compilations(self) -> int:
        """How often the training step was compiled for these arms."""
        return self._past + (self._compiled.compilations() if self._compiled else 0)

    def run_some(self) -> list[tuple[Cell, dict[str, Any]]]:
        """Claim, train and record as many cells as are trained together; none if none is free."""
        missing = [cell for cell in self._ledger.missing() if cell.arm in self._arms]
        with ExitStack() as claims:
            cells = []
            for cell in missing:
                if claims.enter_context(self._ledger.claim(cell)):
                    cells.append(cell)
                if len(cells) == self._width(len(missing)):
                    break
            results = self._train(cells) if cells else []
            for cell, result in zip(cells, results):
                self._ledger.write(cell, result)
        return list(zip(cells, results))

    def _width(self, missing: int) -> int:
        """How many cells to train together: as compiled, else so that all rounds are as full."""
        if self._compiled:
            return self._compiled.together
        rounds = math.ceil(missing / self._together)
        return math.ceil(missing / rounds)

    def _train(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """The results of claimed cells."""
        description, train, evaluation = self._data
        configs = [self._ledger.plan.cell_config(cell.arm, cell.seed) for cell in cells]
        began = time.perf_counter()
        results: list[dict[str, Any]]
        try:
            if not self._compiled:
                self._compiled = compile_structure(configs[0], description, len(cells))
            results = train_cells(configs, self._compiled, train, evaluation)
        except Exception as error:  # one arm's failure must not stop the others
            if OUT_OF_MEMORY in str(error) and len(cells) > 1:
                return self._train_fewer(cells)
            reason = f'{type(error).__name__}: {error}'
            results = [{'status': 'failed', 'reason': reason} for _ in cells]
        for result in results:
            result['wall_seconds'] = (time.perf_counter() - began) / len(cells)
            result['compilations'] = self.compilations()
        return results

    def _train_fewer(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """The same, half as many at a time; so are those that follow."""
        self._past, self._compiled = self.compilations(), None
        self._together = len(cells) // 2
        results = []
        while len(results) < len(cells):
            results += self._train(cells[len(results) :][: self._together])
        return results
