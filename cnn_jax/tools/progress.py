"""The view of a running training: a bar on a terminal or in a notebook, lines elsewhere; and how
it is interrupted.
"""

import os
import signal
import sys
from typing import Any

from tqdm import tqdm

from cnn_jax import mesh
from cnn_jax.errors import printable


class Progress:
    """A run's progress from its `first` update on; use as a context manager.

    By default a bar is drawn when standard output is a terminal or a notebook's cell.
    """

    def __init__(
        self, total: int, first: int, batch_size: int, per_epoch: float, live: bool | None = None
    ):
        if live is None:
            live = in_notebook() or sys.stdout.isatty()
        # In images and epochs of them: tqdm shows images/s.
        self._batch_size, self._per_epoch = batch_size, per_epoch
        self._bar: Any = tqdm(
            total=total * batch_size,
            initial=first * batch_size,
            unit=' images',
            unit_scale=True,
            file=sys.stdout,
            disable=not live,
            dynamic_ncols=True,
        )
        self._epochs = total / per_epoch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def step(self, step: int, loss: float, accuracy: float) -> None:
        """Show the running training metrics after a step."""
        if self._bar.disable:
            return
        epoch = f'epoch {step / self._per_epoch:.1f}/{self._epochs:.3g}'
        self._bar.set_description_str(epoch, refresh=False)
        self._bar.set_postfix_str(f'loss {loss:.4f}  accuracy {accuracy:.4f}', refresh=False)
        self._bar.update(step * self._batch_size - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(printable(line, keep='\n\t'))


def in_notebook() -> bool:
    """Return whether this code runs in a notebook's kernel."""
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    return type(shell).__name__ in ('ZMQInteractiveShell', 'Shell')  # Jupyter, Colab


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
