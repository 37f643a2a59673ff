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
from cnn_jax.tools import predict
from cnn_jax.tools.predict import Prediction, image_paths, mc_dropout, uncertainty, with_dropout

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
    assert not np.array_equal(changed, apply(still, variables))


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


def test_draws_that_are_sure_and_disagree_are_all_information_and_those_that_agree_none():
    """One draw is sure of class 0, one of class 1: H = I = log 2."""
    with np.errstate(divide='ignore'):
        mean, total, information = uncertainty(np.log([[[1.0, 0.0]], [[0.0, 1.0]]]))
    np.testing.assert_array_equal(mean, [[0.5, 0.5]])
    np.testing.assert_allclose([total[0], information[0]], np.log(2))
    _, total, information = uncertainty(np.log(np.full((5, 2, 4), 0.25, np.float32)))
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, np.log(4))
    np.testing.assert_allclose(information, 0, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(draws=st.integers(1, 6), classes=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_information_is_the_mean_divergence_from_the_mean(draws, classes, seed):
    """I = mean_s KL(p_s ‖ p̄), between 0 and H, which is at most log K."""
    p = np.random.default_rng(seed).dirichlet(np.ones(classes), size=(draws, 1))
    mean, total, information = uncertainty(np.log(p))
    divergence = np.mean([entropy(each[0], mean[0]) for each in p])
    np.testing.assert_allclose(information[0], divergence, atol=1e-12)
    assert 0 <= information[0] <= total[0] <= np.log(classes) + 1e-12


def test_a_prediction_is_one_line_and_one_object():
    unsure = {'entropy': 0.5623, 'mutual_information': 0.125}
    sure = Prediction(Path('a.png'), (('cat', 0.75), ('dog', 0.25)), uncertainty=unsure)
    told = 'a.png: cat 75.0%  dog 25.0%  entropy 0.562  mutual information 0.125'
    assert sure.as_text() == told
    first, second = {'class': 'cat', 'probability': 0.75}, {'class': 'dog', 'probability': 0.25}
    assert sure.as_json() == {'file': 'a.png', **first, 'top': [first, second], **unsure}
    bad = Prediction(Path('\x1b[1m\n.png'), error='it is empty')
    assert bad.as_text() == r'\x1b[1m\n.png: not read: it is empty'
    assert bad.as_json() == {'file': '\x1b[1m\n.png', 'error': 'it is empty'}


class Counting(list):
    """Paths that count how many were asked for."""

    asked = 0

    def __getitem__(self, part):
        found = super().__getitem__(part)
        self.asked += len(found)
        return found


def test_files_are_read_batch_by_batch_as_they_are_asked_for(run, monkeypatch):
    probabilities = np.array([0.2, 0.5, 0.3])
    fake = run()
    fake.class_names = ['a', 'b', 'c']
    fake.predict = lambda images: np.tile(probabilities, (len(images), 1))
    monkeypatch.setattr(
        predict, 'read_image', lambda _, path: np.zeros((8, 8, 1), np.uint8) if path != 7 else 'no'
    )
    paths = Counting(range(1000))
    rows = predict.predict_files(fake, paths, batch_size=10, top=2)
    assert paths.asked == 0
    assert next(rows).classes == (('b', 0.5), ('c', 0.3))
    assert paths.asked == 10
    rest = list(rows)
    assert [row.path for row in rest] == list(range(1, 1000))
    assert [row.path for row in rest if row.error] == [7]


@pytest.mark.parametrize(
    'name', ['https://example.org/a.jpg', '*.jpg', 'img[0-9].png', '', '~no_such/a']
)
def test_what_is_no_file_is_told_before_anything_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'URL|matches|empty|no such home'):
        image_paths([name])
    monkeypatch.setenv('HOME', str(tmp_path))
    assert image_paths(['~/a.png']) == [tmp_path / 'a.png']
    Path('a*[1].png').touch()
    assert image_paths(['a*[1].png', 'missing.png']) == [Path('a*[1].png'), Path('missing.png')]
