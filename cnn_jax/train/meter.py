"""The training metrics of the steps since the last report."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from cnn_jax.errors import RunFailed
from cnn_jax.train import metrics
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.record import Record
from cnn_jax.train.shared import SharedCheckpoints


class Meter:
    """Sums the metrics of the steps, two steps behind the device so that it need not wait.

    Every step's loss is looked at, so a loss that is not finite stops the run at its step.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | SharedCheckpoints,
        record: Record,
        explain: Callable[[int], str],
    ):
        self._waiting: collections.deque = collections.deque()
        self._sums: metrics.Sums | None = None
        self._checkpoints, self._record, self._explain = checkpoints, record, explain
        self.latest: tuple[float, float] | None = None  # loss and accuracy so far

    def add(self, step: int, sums: metrics.Sums) -> None:
        """Take the sums of a step that may still be running."""
        self._waiting.append((step, sums))
        while len(self._waiting) > 2:
            self._absorb()

    def drain(self) -> None:
        """Wait for all steps."""
        while self._waiting:
            self._absorb()

    def _absorb(self) -> None:
        step, sums = self._waiting.popleft()
        self._sums = metrics.add(self._sums, sums)
        self._record.step(sums['objective'], sums['gradient_norm'])
        if not np.isfinite(sums['objective']) or not np.isfinite(sums['gradient_norm']):
            saved = self._checkpoints.latest()
            where = (
                f'the last good checkpoint is step {saved}' if saved else 'nothing was saved yet'
            )
            raise RunFailed(
                f'the loss or its gradient is not finite at step {step}: {self._explain(step)}; '
                f'{where}. Try a lower '
                'config.optimizer.learning_rate, config.optimizer.clip_norm=1 or a warm-up '
                '(config.optimizer.warmup_epochs) in a new --workdir'
            )
        count = self._sums['count']
        self.latest = self._sums['loss'] / count, np.trace(self._sums['confusion']) / count

    def take(self) -> metrics.Sums:
        """The sums since the last call, which starts them anew."""
        sums, self._sums = self._sums, None
        assert sums is not None
        return sums

    def pending_sums(self) -> dict[str, Any] | None:
        """The sums so far as JSON, for a checkpoint in the middle of an epoch."""
        return self._sums and {name: np.asarray(part).tolist() for name, part in self._sums.items()}

    def resume(self, sums: dict[str, Any] | None) -> None:
        """Go on with the sums that `pending_sums` gave."""
        self._sums = sums and {name: np.asarray(part) for name, part in sums.items()}
