"""Main effects and interactions by hand."""

import itertools

import numpy as np
import pytest

from cnn_jax.ablation.statistics import contrasts

FACTORS = {'dropout': [0.0, 0.25, 0.5], 'norm': ['none', 'batch']}
LEVELS = [dict(zip(FACTORS, levels)) for levels in itertools.product(*FACTORS.values())]


def effects(outcome):
    weights = contrasts(FACTORS, LEVELS, LEVELS[0])
    y = np.array([outcome(**arm) for arm in LEVELS])
    return {name: float(w @ y) for name, w in weights.items()}


def test_additive_outcomes_have_no_interaction():
    found = effects(lambda dropout, norm: 3 + 2 * dropout + (norm == 'batch'))
    assert found == pytest.approx(
        {
            'dropout=0.25': 0.5,
            'dropout=0.5': 1,
            'norm=batch': 1,
            'dropout=0.25 × norm=batch': 0,
            'dropout=0.5 × norm=batch': 0,
        }
    )


def test_interaction_is_the_change_of_an_effect():
    found = effects(lambda dropout, norm: dropout * (norm == 'batch'))
    assert found['dropout=0.5 × norm=batch'] == pytest.approx(0.5)
    assert found['dropout=0.5'] == pytest.approx(0.25)
    assert found['norm=batch'] == pytest.approx(0.25)


def test_third_factor_is_averaged_over():
    factors = {'a': [0, 1], 'b': [0, 1], 'c': [0, 1]}
    levels = [dict(zip(factors, x)) for x in itertools.product((0, 1), repeat=3)]
    y = np.array([arm['a'] * arm['b'] + 5 * arm['c'] for arm in levels])
    found = {k: float(w @ y) for k, w in contrasts(factors, levels, levels[0]).items()}
    assert found == pytest.approx(
        {'a=1': 0.5, 'b=1': 0.5, 'c=1': 5, 'a=1 × b=1': 1, 'a=1 × c=1': 0, 'b=1 × c=1': 0}
    )
