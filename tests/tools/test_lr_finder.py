"""The learning-rate finder: made-up curves, a real sweep, and that it leaves no trace."""

import csv
import random

import jax
import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.tools import lr_finder
from cnn_jax.train.program import state_maker

RATES = np.geomspace(1e-4, 1.0, 81)


def test_smoothing_keeps_a_constant_and_averages_the_rest():
    np.testing.assert_allclose(lr_finder.smoothed(np.full(9, 2.5)), 2.5)
    expected = (0.9 * 1.0 + 3.0) / 1.9
    np.testing.assert_allclose(lr_finder.smoothed(np.array([1.0, 3.0])), [1.0, expected])


CURVES = {  # a loss at each of the rates, and the bounds of the suggestion
    # Smoothing over ten steps lags behind by about as many: here a factor of up to three.
    'valley': (1 + np.log10(RATES / 0.1) ** 2, 0.01, 0.032),
    'ends in nan': (np.append(np.linspace(2, 1, 40), np.nan), RATES[0], RATES[40]),
    'jumps first': (np.r_[0.1, 9.0, np.linspace(5, 3, 60), np.linspace(3, 9, 19)], 0.01, 0.1),
    'never falls': (np.linspace(1, 2, 81), None, None),
}


@pytest.mark.parametrize('name', CURVES)
def test_the_suggestion_is_a_tenth_of_the_best_rate(name):
    losses, least, most = CURVES[name]
    if least is None:
        with pytest.raises(UserError, match='did not fall'):
            lr_finder.suggestion(RATES, losses)
    else:
        assert least < lr_finder.suggestion(RATES, losses) < most


@pytest.fixture
def sweep(small, kept):
    """Sweeps a tiny run; returns its rates and losses."""

    def make(**changes):
        config = small(optimizer__name='sgd', **changes)
        _, phases = kept(config, (8, 8, 1), 50)
        rates = np.geomspace(1e-4, 1e4, 60)
        state = state_maker(phases[0].program)(config.seed)
        return rates, lr_finder.losses(config, phases[0], state, rates)

    return make


def test_a_sweep_ends_soon_after_the_loss_explodes(sweep):
    rates, losses = sweep()
    curve = lr_finder.smoothed(losses)
    assert len(losses) < len(rates)
    assert not np.isfinite(losses[-1]) or curve[-1] > 4 * curve.min()
    assert 1e-4 < lr_finder.suggestion(rates, losses) < 10


def test_a_loss_below_0_is_swept_as_far(sweep):
    """A confidence penalty of 3 takes more off the loss at the start than it is."""
    rates, losses = sweep(loss__confidence_penalty=3.0)
    assert losses[0] < 0
    assert len(rates) > len(losses) > 20
    assert 1e-4 < lr_finder.suggestion(rates, losses) < 10


def test_it_leaves_no_trace(small, fit_again, sweep, tmp_path):
    config = small(train__epochs=1.0)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    before = fit_again(config, tmp_path / 'before')
    first, again = sweep(), sweep()
    after = fit_again(config, tmp_path / 'after')
    np.testing.assert_array_equal(first[1], again[1])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before.state, after.state)))
    assert random.getstate() == python
    np.testing.assert_array_equal(np.random.get_state()[1], numpy)


def test_the_files_hold_the_curve(tmp_path):
    losses = np.linspace(2, 1, 20)
    lr_finder.write_csv(RATES, losses, tmp_path / 'lr.csv')
    lr_finder.draw(RATES, losses, 0.01, tmp_path / 'lr.png')
    rows = list(csv.DictReader((tmp_path / 'lr.csv').open()))
    assert [float(row['loss']) for row in rows] == losses.tolist()
    assert [float(row['learning_rate']) for row in rows] == RATES[:20].tolist()
    assert (tmp_path / 'lr.png').read_bytes()[:4] == b'\x89PNG'
