"""The view of a running training: a bar on a terminal or in a notebook, lines elsewhere; and how
it is interrupted.
"""

import io
import os
import signal
import sys
import time
from typing import Any

from cnn_jax import mesh
from cnn_jax.errors import printable

REDRAWN = 0.2  # seconds between two views of a notebook's bar


class Progress:
    """Shows a run's progress; use as a context manager.

    Args:
        total, first: Updates of the whole run, and those done before it was resumed.
        batch_size: Images a step.
        per_epoch: Updates an epoch.
        live: Draw a bar; by default when standard output is a terminal or a notebook's cell.
    """

    def __init__(
        self, total: int, first: int, batch_size: int, per_epoch: float, live: bool | None = None
    ):
        self._total, self._first, self._batch_size = total, first, batch_size
        self._per_epoch, self._began = per_epoch, time.perf_counter()
        self._notebook = in_notebook()
        self._bar, self._view, self._drawn = None, None, 0.0
        if live or (live is None and (self._notebook or sys.stdout.isatty())):
            self._bar, self._task = _bar(total, first)

    def __enter__(self):
        if self._bar and not self._notebook:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar and self._notebook:
            self._draw()
        elif self._bar:
            self._bar.stop()

    def step(self, step: int, loss: float, accuracy: float) -> None:
        """Show the running training metrics after a step."""
        if not self._bar:
            return
        now = time.perf_counter()
        speed = (step - self._first) * self._batch_size / max(now - self._began, 1e-9)
        self._bar.update(
            self._task,
            completed=step,
            epoch=f'{step / self._per_epoch:.1f}/{self._total / self._per_epoch:.3g}',
            loss=f'{loss:.4f}',
            accuracy=f'{accuracy:.4f}',
            speed=f'{speed:,.0f}',
        )
        if self._notebook and now - self._drawn > REDRAWN:
            self._draw()

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar and not self._notebook:
            self._bar.console.print(printable(line, keep='\n\t'), markup=False)
        else:
            print(line, flush=True)

    def _draw(self) -> None:
        """Update the bar's view in a notebook: plain text, which needs no widget library."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]
        from rich.console import Console

        assert self._bar
        shown = io.StringIO()
        console = Console(file=shown, width=100, force_terminal=False, force_jupyter=False)
        console.print(self._bar.get_renderable())
        text = {'text/plain': shown.getvalue().rstrip()}
        self._drawn = time.perf_counter()
        if self._view:
            self._view.update(text, raw=True)
        else:
            self._view = display(text, raw=True, display_id=True)


def in_notebook() -> bool:
    """Return whether this code runs in a notebook's kernel."""
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    return type(shell).__name__ in ('ZMQInteractiveShell', 'Shell')  # Jupyter, Colab


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


class Interruption:
    """Notes SIGTERM and Ctrl-C so that the loop can save first; a second one stops at once.

    Several processes all stop at the same step, whichever is asked: JAX notes their SIGTERM and
    agrees on the step.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict = {}

    def __enter__(self):
        several = mesh.is_multiprocess()
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stops_after(self, step: int) -> bool:
        """Return whether all processes stop after this step; each must ask after every one."""
        if mesh.is_multiprocess():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _note(self, _number, _frame):
        self.requested = True
        self.__exit__()  # a second signal finds the handlers that were there before
        if mesh.is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)
