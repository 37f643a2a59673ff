"""What a person sees of an ablation that runs: a live table on a terminal, lines elsewhere."""

import math
import sys
import time
from typing import Any

import numpy as np

from cnn_jax.ablation.ledger import Cell, Ledger
from cnn_jax.ablation.wording import METRICS, number


class Progress:
    """Follows the cells of a ledger, whoever runs them; use as a context manager.

    Args:
        ledger: Of the ablation.
        live: Draw a table; by default when standard output is a terminal.
    """

    def __init__(self, ledger: Ledger, live: bool | None = None):
        self._ledger = ledger
        self._results: dict[Cell, dict[str, Any]] = {}
        self._began = time.perf_counter()
        self._live = None
        self._look()
        self._before = len(self._results)
        if sys.stdout.isatty() if live is None else live:
            from rich.live import Live

            self._live = Live(auto_refresh=False)

    def __enter__(self):
        if self._before:
            print(f'{self._before} of {len(self._ledger.cells())} cells are done already')
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live:
            self._live.stop()

    def update(self) -> None:
        """Show what was finished since the last call."""
        new = self._look()
        if self._live:
            self._live.update(self._screen(), refresh=True)
        else:
            for cell in new:
                print(self._line(cell), flush=True)

    def table(self) -> Any:
        """How far each arm is, with the mean of its results so far."""
        from rich.table import Table

        metric, baseline = METRICS[self._ledger.plan.metric], self._ledger.plan.baseline
        table = Table(box=None, pad_edge=False, header_style='bold')
        unit = f', {metric.suffix}' if metric.suffix else ''
        heads = ('done', 'running', 'failed', f'test {metric.title}{unit}', f'− {baseline}')
        table.add_column('arm', no_wrap=True)
        for head in heads:
            table.add_column(head, justify='right')
        running = [cell.arm for cell in self._ledger.running()]
        for arm in self._ledger.plan.configs:
            values, reference = self._values(arm), self._values(baseline)
            failed = [
                c for c, r in self._results.items() if (c.arm, r['status']) == (arm, 'failed')
            ]
            pairs = [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
            table.add_row(
                arm,
                f'{len(values)}/{len(self._ledger.plan.seeds)}',
                str(running.count(arm) or ''),
                str(len(failed) or ''),
                _mean_sd(list(values.values()), metric.scale, False),
                '' if arm == baseline else _mean_sd(pairs, metric.scale, True),
            )
        return table

    def _look(self) -> list[Cell]:
        """Read the results that have appeared."""
        new = [c for c in self._ledger.cells() if c not in self._results and c.path.exists()]
        self._results |= {cell: cell.result() for cell in new}
        return new

    def _values(self, arm: str) -> dict[int, float]:
        metric = self._ledger.plan.metric
        return {
            cell.seed: result['metrics']['eval'].get(metric, math.nan)  # top5 needs six classes
            for cell, result in self._results.items()
            if cell.arm == arm and result['status'] == 'done'
        }

    def _screen(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        done, total = len(self._results), len(self._ledger.cells())
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f'{done}/{total} cells',
            ProgressBar(total=total, completed=done, width=30),
            f'{_clock(time.perf_counter() - self._began)} gone',
            self._left(),
        )
        return Group(head, self.table())

    def _line(self, cell: Cell) -> str:
        result, metric = self._results[cell], METRICS[self._ledger.plan.metric]
        if result['status'] == 'done':
            values = self._values(cell.arm)
            value = values[cell.seed]
            text = (
                f'{metric.title} {number(value * metric.scale, 2)}{metric.suffix} '
                f'(mean of {len(values)}: {_mean_sd(list(values.values()), metric.scale, False)})  '
                f'{result["wall_seconds"]:.1f} s'
            )
        else:
            text = f'FAILED: {result["reason"]}'
        place = f'[{len(self._results)}/{len(self._ledger.cells())}]'
        return f'{place} {cell.arm}, seed {cell.seed}: {text}, {self._left()}'

    def _left(self) -> str:
        """The time left, if the rest runs as fast as the cells since the start."""
        here, total = len(self._results) - self._before, len(self._ledger.cells())
        if not here:
            return 'time left unknown yet'
        each = (time.perf_counter() - self._began) / here
        return f'{_clock(each * (total - len(self._results)))} left'


def _mean_sd(sample: list[float], scale: float, signed: bool) -> str:
    """`97.12 ± 0.40`, the standard deviation only of two or more."""
    if not sample:
        return '–'
    mean = number(float(np.mean(sample)) * scale, 2, signed)
    if len(sample) < 2:
        return mean
    return f'{mean} ± {number(float(np.std(sample, ddof=1)) * scale, 2)}'


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'
