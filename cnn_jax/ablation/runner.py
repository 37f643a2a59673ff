"""Running the cells of a ledger, in this process."""

import time
from collections.abc import Callable
from typing import Any

from cnn_jax.ablation.cell import Compiled, compile_structure, run_cell
from cnn_jax.ablation.ledger import Cell, Ledger
from cnn_jax.ablation.plan import by_structure
from cnn_jax.data.memory import Arrays

Tell = Callable[[Cell, dict[str, Any]], object]


def run_cells(
    ledger: Ledger,
    description: dict[str, Any],
    train: Arrays,
    evaluation: Arrays,
    tell: Tell,
    start: int = 0,
) -> dict[str, int]:
    """Run every cell that is missing and that no other process has.

    Cells of one structure follow each other and share one compilation.

    Args:
        ledger: Of the ablation.
        description: Of the data, as `train.setup.describe` gives it, with `preprocessing`.
        train, evaluation: The decoded splits.
        tell: Called with each cell and its result.
        start: Number of the structure to begin with, so that several workers begin with
            different ones.

    Returns:
        Cells done here and compilations of the training step.
    """
    structures = by_structure(ledger.plan)
    shift = start % len(structures)
    done, compilations = 0, 0
    for arms in structures[shift:] + structures[:shift]:
        compiled: Compiled | None = None
        for cell in ledger.cells():
            if cell.arm not in arms or cell.path.exists():
                continue
            with ledger.claim(cell) as mine:
                if not mine:
                    continue
                config = ledger.plan.cell_config(cell.arm, cell.seed)
                began = time.perf_counter()
                result: dict[str, Any]
                try:
                    compiled = compiled or compile_structure(config, description)
                    result = run_cell(config, compiled, train, evaluation)
                except Exception as error:  # one arm's failure must not stop the others
                    result = {'status': 'failed', 'reason': f'{type(error).__name__}: {error}'}
                result['wall_seconds'] = time.perf_counter() - began
                result['compilations'] = compiled.compilations() if compiled else 0
                ledger.write(cell, result)
                tell(cell, result)
                done += 1
        compilations += compiled.compilations() if compiled else 0
    return {'cells': done, 'compilations': compilations}
