"""Metrics as sums and counts: add them over batches, divide once at the end.

Sums of padded examples are zero, so no example is dropped or counted twice. Also here: the sums of
the steps since the last report, and the early-stopping rule, which is a function of metrics.
"""

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cnn_jax import config as cfg

BINS = 15  # of the calibration error (Guo et al. 2017)

Sums = dict[str, Any]


def batch_sums(
    log_probs: Float[Array, 'b k'],
    losses: Float[Array, ' b'],
    labels: Int[Array, ' b'],
    mask: Bool[Array, ' b'],
) -> Sums:
    """The sums of one batch that every metric follows from; `mask` is False for padding.

    Returns:
        `count`, `loss` (Σ losses), per true class `class_count`, `class_correct` [K], `top5`, and
        per bin of confidence `bin_count`, `bin_confidence`, `bin_correct` [BINS].
    """
    weight = mask.astype(jnp.int32)
    predicted = jnp.argmax(log_probs, axis=-1)
    correct = predicted == labels
    true = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)
    rank = jnp.sum(log_probs > true, axis=-1)
    confidence = jnp.exp(jnp.max(log_probs, axis=-1))
    # Bins are open on the left, ((i-1)/BINS, i/BINS], as in the paper.
    place = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    in_bin = jax.nn.one_hot(place, BINS, dtype=jnp.float32) * mask[:, None]
    of_class = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=jnp.int32) * weight[:, None]
    return {
        'count': weight.sum(),
        'loss': jnp.sum(jnp.where(mask, losses, 0.0)),
        'class_count': of_class.sum(0),
        'class_correct': (of_class * correct[:, None]).sum(0),
        'top5': jnp.sum(weight * (rank < 5)),
        'bin_count': in_bin.sum(0),
        'bin_confidence': (in_bin * confidence[:, None]).sum(0),
        'bin_correct': (in_bin * correct[:, None]).sum(0),
    }


def confusion(
    log_probs: Float[Array, 'b k'], labels: Int[Array, ' b'], mask: Bool[Array, ' b']
) -> Int[Array, 'k k']:
    """Examples of a true class (row) for which a class (column) was predicted."""
    classes, predicted = log_probs.shape[-1], jnp.argmax(log_probs, axis=-1)
    none = jnp.zeros((classes, classes), jnp.int32)
    return none.at[labels, predicted].add(mask.astype(jnp.int32))


def add(total: Sums | None, new: Sums) -> Sums:
    """Sums of two parts of the data, as float64 and int64 on the host.

    The order of addition is the order of the batches, so a resumed run adds the same numbers.
    """
    wide = {
        name: np.asarray(part, np.int64 if np.issubdtype(part.dtype, np.integer) else np.float64)
        for name, part in jax.device_get(new).items()
    }
    return wide if total is None else {name: total[name] + wide[name] for name in wide}


def result(sums: Sums) -> dict[str, Any]:
    """The metrics of the examples behind the sums.

    accuracy = Σ [ŷ = y] / N;  top5 the same with y among the five most probable classes
    class_accuracy[k] = Σ [ŷ = y = k] / Σ [y = k]
    calibration_error = Σ_bins (n_bin/N)·|accuracy_bin − confidence_bin|

    Returns:
        `loss` (nats an example), `accuracy`, `top5` (of more than five classes) and
        `calibration_error`, floats in natural units; `class_accuracy` (NaN for a class without
        examples) and, if it is among the sums, `confusion` as arrays; `count`.

    Source: expected calibration error, Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    count = int(sums['count'])
    correct, per_class = np.asarray(sums['class_correct']), np.asarray(sums['class_count'])
    top5 = {'top5': float(np.float64(sums['top5']) / count)} if len(per_class) > 5 else {}
    confusion = {'confusion': np.asarray(sums['confusion'])} if 'confusion' in sums else {}
    gaps = np.abs(sums['bin_correct'] - sums['bin_confidence'])
    with np.errstate(invalid='ignore', divide='ignore'):
        return {
            'count': count,
            'loss': float(np.float64(sums['loss']) / count),
            'accuracy': float(np.float64(correct.sum()) / count),
            **top5,
            'calibration_error': float(gaps.sum() / count),
            'class_accuracy': correct / per_class,
            **confusion,
        }


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that are single numbers, in the order they are shown."""
    return {
        name: metrics[name]
        for name in ('loss', 'accuracy', 'top5', 'calibration_error')
        if name in metrics
    }


def as_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics as a line of the record: all but the confusion matrix; NaN becomes null."""
    classes = [None if np.isnan(a) else float(a) for a in metrics['class_accuracy']]
    return {**scalars(metrics), 'count': metrics['count'], 'class_accuracy': classes}


class NotFinite(Exception):
    """The objective or its gradient is not finite after a step, whose number it holds."""

    def __init__(self, step: int):
        super().__init__(f'step {step} is not finite')
        self.step = step


class StepMetrics:
    """Sums of the steps since the last report, two steps behind the device so it need not wait.

    `record` is called with each step's objective and gradient norm, in order; `sums` are the
    result of `pending` before the run was interrupted, if it was.
    """

    def __init__(self, record: Callable[[float, float], object], sums: dict[str, Any] | None):
        self._waiting: collections.deque[tuple[int, Sums]] = collections.deque()
        self._sums = {name: np.asarray(part) for name, part in sums.items()} if sums else None
        self._record = record
        self.latest: tuple[float, float] | None = None  # mean loss and accuracy so far

    def add(self, step: int, sums: Sums) -> None:
        """Add the sums of a step that may still be running; it or one before may be `NotFinite`."""
        self._waiting.append((step, sums))
        while len(self._waiting) > 2:
            self._consume()

    def flush(self) -> None:
        """Wait for all steps; errors as for `add`."""
        while self._waiting:
            self._consume()

    def _consume(self) -> None:
        step, sums = self._waiting.popleft()
        self._sums = total = add(self._sums, sums)
        self._record(sums['objective'], sums['gradient_norm'])
        if not np.isfinite(sums['objective']) or not np.isfinite(sums['gradient_norm']):
            raise NotFinite(step)
        self.latest = total['loss'] / total['count'], total['class_correct'].sum() / total['count']

    def pop(self) -> Sums:
        """Return the sums since the last call, and start anew."""
        sums, self._sums = self._sums, None
        assert sums is not None
        return sums

    def pending(self) -> dict[str, Any] | None:
        """Return the sums so far as JSON, for a checkpoint in the middle of an epoch."""
        if self._sums is None:
            return None
        return {name: np.asarray(part).tolist() for name, part in self._sums.items()}


@dataclass(frozen=True)
class EarlyStopping:
    """The best evaluation so far; training stops once it is `train.patience` epochs ago.

    The run leaves the weights of its best evaluation, the last one of equals.

    Source: Prechelt 1998, "Early Stopping — But When?"; patience as in Keras's `EarlyStopping`.
    """

    score: float = float('-inf')  # higher is better
    step: int = 0  # of the first evaluation that had it

    def after(self, step: int, score: float) -> 'EarlyStopping':
        """Return what holds after another evaluation; a NaN is never better."""
        return EarlyStopping(score, step) if score > self.score else self

    def is_over(self, config: cfg.Config, step: int, steps_per_epoch: float) -> bool:
        """Return whether patience has run out at the evaluation after `step`.

        step − best step ≥ ⌊patience · steps_per_epoch⌋: evaluations fall on whole steps, so that
        two of them an epoch apart may be closer than an epoch by less than a step.
        """
        wait = int(min(config.train.patience * steps_per_epoch + 1e-9, 2**53))
        return bool(config.train.patience) and step - self.step >= max(wait, 1)


def doubts(result: dict[str, Any], classes: int) -> list[str]:
    """The reasons to doubt the predicted probabilities of an evaluation, and what helps."""
    loss, guess, gap = result['loss'], math.log(classes), result['calibration_error']
    cure = (
        'lower config.optimizer.learning_rate, stop early (config.train.patience), and scale '
        'pretrained features (config.model.scale_features)'
    )
    if loss > guess:
        return [
            f'the loss of {loss:.2f} nats is above the {guess:.2f} of equal guesses: the network '
            f'is wrong with confidence; {cure}'
        ]
    if gap > 0.1:
        return [f'confidence and accuracy are {100 * gap:.0f} points apart on average; {cure}']
    return []


def score_of(config: cfg.Config, metrics: dict[str, float]) -> float:
    """The early-stopping score of an evaluation, by `train.best`; higher is better."""
    return -metrics['loss'] if config.train.best == 'loss' else metrics['accuracy']
