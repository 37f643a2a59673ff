"""Metrics as sums and counts: add them over batches, divide once at the end.

Sums of padded examples are zero, so no example is dropped or counted twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BINS = 15  # of the calibration error (Guo et al. 2017)

Sums = dict[str, Any]


def batch_sums(
    log_probs: Float[Array, 'b k'],
    losses: Float[Array, ' b'],
    labels: Int[Array, ' b'],
    mask: Bool[Array, ' b'],
) -> Sums:
    """The sums of one batch that every metric follows from.

    Args:
        log_probs: Log class probabilities.
        losses: Loss of each example.
        labels: True classes.
        mask: False for padding.

    Returns:
        `count`, `loss` (Σ losses), `confusion` [K true, K predicted], `top5`, and per bin of
        confidence `bin_count`, `bin_confidence`, `bin_correct` [BINS].
    """
    classes = log_probs.shape[-1]
    weight = mask.astype(jnp.int32)
    predicted = jnp.argmax(log_probs, axis=-1)
    correct = predicted == labels
    true = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)
    rank = jnp.sum(log_probs > true, axis=-1)
    confidence = jnp.exp(jnp.max(log_probs, axis=-1))
    # Bins are open on the left, ((i-1)/BINS, i/BINS], as in the paper.
    place = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    in_bin = jax.nn.one_hot(place, BINS, dtype=jnp.float32) * mask[:, None]
    confusion = jnp.zeros((classes, classes), jnp.int32).at[labels, predicted].add(weight)
    return {
        'count': weight.sum(),
        'loss': jnp.sum(jnp.where(mask, losses, 0.0)),
        'confusion': confusion,
        'top5': jnp.sum(weight * (rank < 5)),
        'bin_count': in_bin.sum(0),
        'bin_confidence': (in_bin * confidence[:, None]).sum(0),
        'bin_correct': (in_bin * correct[:, None]).sum(0),
    }


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
    class_accuracy[k] = confusion[k, k] / Σ_j confusion[k, j]
    calibration_error = Σ_bins (n_bin/N)·|accuracy_bin − confidence_bin|

    Returns:
        `loss` (nats an example), `accuracy`, `top5` (of more than five classes) and
        `calibration_error`, floats in natural units; `class_accuracy` (NaN for a class without
        examples) and `confusion` as arrays; `count`.

    Source: expected calibration error, Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    count = int(sums['count'])
    top5 = {'top5': float(np.float64(sums['top5']) / count)} if len(sums['confusion']) > 5 else {}
    confusion = np.asarray(sums['confusion'])
    per_class = confusion.sum(axis=1)
    gaps = np.abs(sums['bin_correct'] - sums['bin_confidence'])
    with np.errstate(invalid='ignore', divide='ignore'):
        return {
            'count': count,
            'loss': float(np.float64(sums['loss']) / count),
            'accuracy': float(np.float64(np.trace(confusion)) / count),
            **top5,
            'calibration_error': float(gaps.sum() / count),
            'class_accuracy': np.diag(confusion) / per_class,
            'confusion': confusion,
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
