"""What a person sees of a run: a live bar on a terminal, one line an epoch elsewhere."""

import sys
import time
from typing import Any


class Progress:
    """Shows a run's progress; use as a context manager.

    Args:
        total_steps: Updates of the whole run.
        first_step: Updates done before (a resumed run).
        batch: Images a step.
        steps_per_epoch: For the epoch number.
        live: Draw a bar; by default when standard output is a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        batch: int,
        steps_per_epoch: float,
        live: bool | None = None,
    ):
        self._batch, self._per_epoch, self._total = batch, steps_per_epoch, total_steps
        self._epochs = total_steps / steps_per_epoch
        self._live = sys.stdout.isatty() if live is None else live
        self._mark = (time.perf_counter(), first_step)
        self._bar = None
        if self._live:
            self._bar, self._task = _bar(total_steps, first_step)

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def step(self, step: int, loss: float, accuracy: float) -> None:
        """Show the running training metrics after a step."""
        if self._bar:
            self._bar.update(
                self._task,
                completed=step,
                epoch=f'{step / self._per_epoch:.1f}/{self._epochs:g}',
                loss=f'{loss:.4f}',
                accuracy=f'{accuracy:.4f}',
                speed=f'{self._speed(step):,.0f}',
            )

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        (self._bar.console.print if self._bar else _print)(line)

    def restart_clock(self, step: int) -> float:
        """Images a second since the last call (or the start), evaluation time excluded."""
        speed = self._speed(step)
        self._mark = (time.perf_counter(), step)
        return speed

    def _speed(self, step: int) -> float:
        began, first = self._mark
        return (step - first) * self._batch / max(time.perf_counter() - began, 1e-9)


def _bar(total: int, first: int):
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn('epoch {task.fields[epoch]}'),
        BarColumn(),
        TextColumn(
            'loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  '
            '{task.fields[speed]} images/s'
        ),
        TimeRemainingColumn(),
    )
    blank: dict[str, Any] = {'epoch': '', 'loss': '…', 'accuracy': '…', 'speed': '…'}
    return bar, bar.add_task('', total=total, completed=first, **blank)


def _print(line: str) -> None:
    print(line, flush=True)
