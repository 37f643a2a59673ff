"""Being asked to stop."""

import signal


class Interruption:
    """Notes SIGTERM and Ctrl-C so that the loop can save first; a second one stops at once."""

    def __init__(self):
        self.requested = False
        self._before: dict = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.requested = True
        signal.signal(number, self._before[number])
