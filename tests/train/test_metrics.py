"""Metrics against scikit-learn and float64; sums over batches; the early-stopping rule."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from cnn_jax import config as cfg
from cnn_jax.regularizers import cross_entropy, log_probabilities
from cnn_jax.train import metrics
from cnn_jax.train.metrics import EarlyStopping


def sums_of(logits, labels, mask=None):
    mask = np.ones(len(labels), bool) if mask is None else mask
    log_probs = log_probabilities(jnp.asarray(logits))
    facts = jnp.asarray(labels), jnp.asarray(mask)
    sums = metrics.batch_sums(log_probs, cross_entropy(log_probs, facts[0]), *facts)
    return sums | {'confusion': metrics.confusion(log_probs, *facts)}


def result_of(logits, labels, batch=None):
    batch, total = batch or len(labels), None
    for start in range(0, len(labels), batch):
        part, answers = logits[start : start + batch], labels[start : start + batch]
        missing = batch - len(part)
        mask = np.arange(batch) < len(part)
        part = np.pad(part, ((0, missing), (0, 0)), constant_values=3.0)
        total = metrics.add(total, sums_of(part, np.pad(answers, (0, missing)), mask))
    return metrics.result(total)


def expected_calibration_error(probs, labels, bins):
    """Straight from the definition, in float64."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    error = 0.0
    for low in range(bins):
        inside = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


@pytest.fixture
def scores():
    draw = np.random.default_rng(3)
    return draw.normal(size=(101, 8), scale=2).astype(np.float32), draw.integers(8, size=101)


def test_accuracy_confusion_and_top5_equal_scikit_learn(scores):
    logits, labels = scores
    got = result_of(logits, labels)
    predicted = logits.argmax(1)
    assert got['accuracy'] == sklearn.metrics.accuracy_score(labels, predicted)
    np.testing.assert_array_equal(
        got['confusion'], sklearn.metrics.confusion_matrix(labels, predicted)
    )
    assert got['top5'] == sklearn.metrics.top_k_accuracy_score(labels, logits, k=5)
    recall = sklearn.metrics.recall_score(labels, predicted, average=None)
    np.testing.assert_allclose(got['class_accuracy'], recall)
    assert got['loss'] == pytest.approx(
        sklearn.metrics.log_loss(labels, np.exp(log_probabilities(logits))), rel=1e-5
    )


def test_calibration_error_follows_its_definition(scores):
    logits, labels = scores
    probs = np.exp(np.asarray(log_probabilities(logits), np.float64))
    expected = expected_calibration_error(probs, labels, metrics.BINS)
    assert result_of(logits, labels)['calibration_error'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('batch', [1, 7, 50, 100, 120])
def test_batching_and_padding_change_nothing(scores, batch):
    logits, labels = scores
    whole, parts = result_of(logits, labels), result_of(logits, labels, batch)
    assert parts['count'] == 101
    np.testing.assert_array_equal(whole['confusion'], parts['confusion'])
    for name, number in metrics.scalars(whole).items():
        assert parts[name] == pytest.approx(number, rel=1e-6), name


def test_a_class_without_examples_has_no_accuracy():
    got = result_of(np.eye(3, dtype=np.float32)[[0, 1]], np.array([0, 1]))
    np.testing.assert_array_equal(got['class_accuracy'], [1, 1, np.nan])


def test_a_sigmoid_is_two_classes():
    got = result_of(np.array([[-1.0], [2.0], [3.0]], np.float32), np.array([0, 1, 0]))
    np.testing.assert_array_equal(got['confusion'], [[1, 1], [0, 1]])


@pytest.mark.parametrize('per_epoch', [1.0, 4.0, 6.25, 15.6])
@pytest.mark.parametrize(
    ('scores', 'patience', 'expected'),  # the epoch after which the run ends, and its best one
    [
        ([1, 2, 3, 4, 5, 6], 2, (6, 6)),  # ever better: to the end
        ([1, 3, 2, 2, 9], 2, (4, 2)),  # too late for the 9
        ([1, 3, 2, 4, 2, 2, 2], 2, (6, 4)),
        ([3, 3, 3, 3], 2, (3, 1)),  # an equal one is no better
        ([3, float('nan'), 1, 4], 2, (3, 1)),
        ([5, 4, 3, 2, 1], 0, (5, 1)),  # no patience asked for
        ([5, 4, 3, 2, 1], 1, (2, 1)),
    ],
)
def test_patience_on_made_up_curves(scores, patience, expected, per_epoch):
    config = cfg.replace(cfg.Config(), {'train.patience': patience})
    best, epoch = EarlyStopping(), 0
    for epoch, score in enumerate(scores, start=1):
        step = int(np.ceil(epoch * per_epoch))  # where `RunSpec.is_boundary` evaluates
        best = best.after(step, score)
        if best.is_over(config, step, per_epoch):
            break
    assert (epoch, round(best.step / per_epoch)) == expected


def test_a_lower_loss_is_better():
    config = cfg.replace(cfg.Config(), {'train.best': 'loss'})
    assert metrics.score_of(config, {'loss': 0.5, 'accuracy': 0.9}) == -0.5
