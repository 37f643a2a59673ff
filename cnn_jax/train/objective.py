"""What a training step minimizes: the mean loss of the batch's examples plus the penalties."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax import config as cfg
from cnn_jax import losses, optim, params, penalties
from cnn_jax.data.batches import Batch
from cnn_jax.models import build
from cnn_jax.params import Flat
from cnn_jax.train import metrics
from cnn_jax.train.task import Task

Penalized = Mapping[str, Sequence[str]]  # field of config.loss -> the paths that it acts on


def make_gradients(
    config: cfg.Config,
    task: Task,
    penalized: Penalized,
    in_inference: Callable,
    method: str | None,
) -> Callable:
    """The gradient of the objective over a batch.

    Args:
        config: A validated config; of its values only whether the switches are on.
        task: What the run is about.
        penalized: The trainable paths of each penalty.
        in_inference: Linen interceptor of what is frozen.
        method: Of the network, for what the batch holds; None for images.

    Returns:
        `(current, learned, fixed, start, batch_stats, batch, key) -> (gradients, batch_stats,
        sums)`: the config with traced values, the flat parameters that are trained and that are
        not, those that training started from (for L2-SP), and the key of dropout. Gradients are
        those of `learned`; the sums are the metrics' and the `objective`.
    """

    def objective(learned, current: cfg.Config, fixed, start, batch_stats, batch: Batch, key):
        net = build(current.model, task.num_classes)
        variables = {'params': params.merge(learned, fixed), 'batch_stats': batch_stats}
        with nn.intercept_methods(in_inference):
            applied: Any = net.apply(
                variables,
                batch['image'],
                train=True,
                rngs={'dropout': key},
                mutable=['batch_stats'],
                method=method,
            )
        logits, updated = applied
        log_probs = losses.log_probabilities(logits)
        each = example_losses(config.loss, current.loss, log_probs, batch)
        sums = metrics.batch_sums(log_probs, each, batch['label'], batch['mask'])
        penalty = total_penalty(config.loss, current.loss, penalized, learned, start)
        value = sums['loss'] / sums['count'] + penalty
        return value, (updated.get('batch_stats', batch_stats), sums)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def gradients(current: cfg.Config, learned, fixed, start, batch_stats, batch: Batch, key):
        def of_piece(learned, stats, piece: Batch, key):
            (value, (stats, sums)), grads = value_and_grad(
                learned, current, fixed, start, stats, piece, key
            )
            return grads, stats, sums | {'objective': value}

        keys = jax.random.split(key, config.optimizer.accumulate)
        found = _accumulate(lambda *rest: of_piece(learned, *rest), batch_stats, batch, keys)
        if not config.optimizer.sam:
            return found
        # The same dropout; statistics and metrics remain those of the weights themselves.
        worse = optim.uphill(learned, found[0], current.optimizer.sam)
        grads, *_ = _accumulate(lambda *rest: of_piece(worse, *rest), batch_stats, batch, keys)
        return grads, *found[1:]

    return gradients


def example_losses(
    on: cfg.Loss, strengths: cfg.Loss, log_probs: Float[Array, 'b k'], batch: Batch
) -> Float[Array, ' b']:
    """The loss of each example, with what regularizes the prediction.

    ℓ = share·CE(label) + (1 − share)·CE(other label) where images were mixed; accuracy is that of
    the own label.

    Args:
        on: Says which switches are on.
        strengths: The same with traced values.
        log_probs: Log class probabilities.
        batch: Holds the labels and, of mixed images, the shares and the other labels.
    """
    smoothing = strengths.label_smoothing
    each = losses.cross_entropy(log_probs, batch['label'], smoothing)
    if 'share' in batch:
        share, other = batch['share'], batch['other_label']
        each = share * each + (1 - share) * losses.cross_entropy(log_probs, other, smoothing)
    if on.confidence_penalty:
        each += losses.confidence_penalty(log_probs, strengths.confidence_penalty)
    return each


def total_penalty(
    on: cfg.Loss, strengths: cfg.Loss, names: Penalized, learned: Flat, start: Flat
) -> Float[Array, '']:
    """The sum of all penalties on the trainable parameters.

    Args:
        on: Says which switches are on.
        strengths: The same with traced values.
        names: The penalized paths of each.
        learned: The trainable parameters.
        start: Those that L2-SP pulls toward, as their training began.
    """
    total = penalties.l2(learned, names['l2'], strengths.l2)
    if on.l1:
        total += penalties.l1(learned, names['l1'], strengths.l1)
    if on.orthogonality:
        total += penalties.orthogonality(learned, names['orthogonality'], strengths.orthogonality)
    if on.l2_sp:
        total += penalties.l2_sp(learned, names['l2_sp'], strengths.l2_sp, start)
    return total


def _accumulate(gradients: Callable, batch_stats, batch: Batch, keys: Array):
    """Mean gradient over len(keys) equal micro-batches taken in turn; batch statistics follow.

    The loop is unrolled: XLA's CPU convolutions are ten times slower inside a compiled one.
    """
    pieces = len(keys)
    parts = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)
    grads, sums = None, None
    for number in range(pieces):
        piece = jax.tree.map(lambda x, number=number: x[number], parts)
        new_grads, batch_stats, new_sums = gradients(batch_stats, piece, keys[number])
        grads = new_grads if grads is None else jax.tree.map(jnp.add, grads, new_grads)
        sums = new_sums if sums is None else jax.tree.map(jnp.add, sums, new_sums)
    assert grads is not None
    assert sums is not None
    sums['objective'] /= pieces
    return jax.tree.map(lambda g: g / pieces, grads), batch_stats, sums
