"""Being asked to stop."""

import os
import signal

from cnn_jax import mesh


class Interruption:
    """Notes SIGTERM and Ctrl-C so that the loop can save first; a second one stops at once.

    Of several processes all stop at the same step, whichever is asked: JAX notes their SIGTERM and
    agrees on the step.
    """

    def __init__(self):
        self.requested = False
        self._before: dict = {}

    def __enter__(self):
        numbers = (signal.SIGINT,) if mesh.is_multiprocess() else (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stops_after(self, step: int) -> bool:
        """Whether all processes stop after this step; each is to ask after every one."""
        if mesh.is_multiprocess():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _note(self, _number, _frame):
        self.requested = True
        self.__exit__()  # whichever comes second finds what was there before
        if mesh.is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)
