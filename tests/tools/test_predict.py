"""Predictions as text and JSON; Monte-Carlo dropout: dropout on and the rest in inference."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from cnn_jax.config import Model
from cnn_jax.errors import UserError
from cnn_jax.models import StridedNet
from cnn_jax.tools.predict import Prediction, mc_dropout, uncertainty, with_dropout

MODEL = Model(stem_width=0, widths=(4,), hidden=(8,), input_noise=1.0, residual=True)
X = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))


def apply(config, variables, **call):
    with nn.intercept_methods(with_dropout):
        rngs = {'dropout': jax.random.key(0)}
        return StridedNet(config, 3).apply(variables, X, train=False, rngs=rngs, **call)


@pytest.fixture
def variables():
    drawn = StridedNet(MODEL, 3).init(jax.random.key(0), X, train=False)
    return jax.tree.map(lambda leaf: leaf + 0.1, drawn)


@pytest.fixture
def run(variables):
    """A stand-in for an opened run."""

    def make(**changes):
        model = dataclasses.replace(MODEL, **changes)
        return SimpleNamespace(
            config=SimpleNamespace(seed=0, model=model),
            step=10,
            model=StridedNet(model, 3),
            variables=variables,
            spec=SimpleNamespace(prepare=lambda images: images),
        )

    return make


def test_only_dropout_leaves_inference(variables):
    """At rate 0 the answer is that of inference, no noise on the images; statistics stay."""
    still = dataclasses.replace(MODEL, dropout=0.0, head_dropout=0.0)
    logits, updated = apply(still, variables, mutable='batch_stats')
    expected = StridedNet(still, 3).apply(variables, X, train=False)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, updated['batch_stats'], variables['batch_stats'])


@pytest.mark.parametrize(
    'change',
    [
        {'dropout': 0.5},
        {'dropout': 0.5, 'drop_kind': 'gaussian'},
        {'dropout': 0.5, 'drop_kind': 'block', 'drop_block': 2},
        {'head_dropout': 0.5},
        {'stochastic_depth': 0.5},
    ],
    ids=str,
)
def test_dropout_of_every_kind_acts(change, variables):
    still = dataclasses.replace(MODEL, dropout=0.0, head_dropout=0.0)
    changed = apply(dataclasses.replace(still, **change), variables)
    assert (changed != apply(still, variables)).any()


def test_draws_differ_by_their_number_and_can_be_repeated(run):
    draw = mc_dropout(run())(X)
    first, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=-1).all()
    np.testing.assert_allclose(np.exp(first).sum(axis=-1), np.ones(6), rtol=1e-5)


def test_a_network_without_dropout_cannot_be_asked(run):
    with pytest.raises(UserError, match=r'no dropout.*leave --mc out'):
        mc_dropout(run(dropout=0.0, head_dropout=0.0))
    with pytest.raises(UserError, match='no dropout'):
        mc_dropout(run(dropout=0.0, hidden=()))
    mc_dropout(run(dropout=0.0, head_dropout=0.0, stochastic_depth=0.1))


def test_sure_draws_that_disagree_are_all_information():
    """One draw is sure of class 0, one of class 1: H = I = log 2."""
    with np.errstate(divide='ignore'):
        mean, total, information = uncertainty(np.log([[[1.0, 0.0]], [[0.0, 1.0]]]))
    np.testing.assert_array_equal(mean, [[0.5, 0.5]])
    np.testing.assert_allclose([total[0], information[0]], np.log(2))


def test_unsure_draws_that_agree_hold_no_information():
    _, total, information = uncertainty(np.log(np.full((5, 2, 4), 0.25)))
    np.testing.assert_allclose(total, np.log(4))
    np.testing.assert_allclose(information, 0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(draws=st.integers(1, 6), classes=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_information_is_the_mean_divergence_from_the_mean(draws, classes, seed):
    """I = mean_s KL(p_s ‖ p̄), between 0 and H, which is at most log K."""
    p = np.random.default_rng(seed).dirichlet(np.ones(classes), size=(draws, 1))
    mean, total, information = uncertainty(np.log(p))
    divergence = np.mean([entropy(each[0], mean[0]) for each in p])
    np.testing.assert_allclose(information[0], divergence, atol=1e-12)
    assert 0 <= information[0] <= total[0] <= np.log(classes) + 1e-12


def test_float32_answers_are_counted_in_float64(run):
    log_probs = np.stack([mc_dropout(run())(X)(number) for number in range(4)])
    assert log_probs.dtype == np.float32
    assert uncertainty(log_probs)[1].dtype == np.float64


CLASSES = (('cat', 0.75), ('dog', 0.25))


def test_a_prediction_without_draws_has_no_uncertainty():
    row = Prediction(Path('a.png'), CLASSES)
    assert row.as_text(top=2) == 'a.png: cat 75.0%  dog 25.0%'
    assert row.as_json(top=1) == {
        'file': 'a.png',
        'class': 'cat',
        'probability': 0.75,
        'top': [{'class': 'cat', 'probability': 0.75}],
    }


def test_a_prediction_from_draws_says_how_unsure_it_is():
    unsure = {'entropy': 0.5623, 'mutual_information': 0.125}
    row = Prediction(Path('a.png'), CLASSES, uncertainty=unsure)
    assert row.as_text(top=1) == 'a.png: cat 75.0%  entropy 0.562  mutual information 0.125'
    assert row.as_json(top=1).items() >= unsure.items()


def test_a_file_that_was_not_read_says_why():
    row = Prediction(Path('a.png'), error='it is empty')
    assert row.as_text(top=1) == 'a.png: not read: it is empty'
    assert row.as_json(top=1) == {'file': 'a.png', 'error': 'it is empty'}
