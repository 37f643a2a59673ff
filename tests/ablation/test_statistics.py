"""Intervals cover, tests keep their level: on simulated data, by hand, and against SciPy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnn_jax.ablation import statistics as s

TRIALS = 2_000


def normal(n: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0.9, 0.01, (TRIALS, n))


def coverage(intervals: np.ndarray, truth: float) -> float:
    return np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))


@pytest.mark.parametrize('n', [2, 5, 10])
def test_paired_t_keeps_its_level(n):
    _, p = s.paired_t(normal(n) - 0.9)
    assert 0.03 <= np.mean(p < 0.05) <= 0.07


def test_family_of_four_arms_keeps_its_level_after_holm():
    generator = np.random.default_rng(4)
    baseline = generator.normal(size=(TRIALS, 1, 5))
    _, p = s.paired_t(generator.normal(size=(TRIALS, 4, 5)) - baseline)
    assert np.mean((np.apply_along_axis(s.holm, -1, p) < 0.05).any(-1)) <= 0.06
    assert np.mean((p < 0.05).any(-1)) > 0.08  # what the correction is for


def test_constant_differences_have_no_t():
    for difference in (0.0, 0.1, 0.3):
        d = 0.9 + difference - np.full(5, 0.9)
        assert np.isnan(s.paired_t(d)[0])


def test_holm_by_hand():
    p = np.array([0.04, 0.01, 0.03, 0.5])
    np.testing.assert_allclose(s.holm(p), [0.09, 0.04, 0.09, 0.5])
    assert s.holm(np.array([])).shape == (0,)


@given(hnp.arrays(float, st.integers(1, 8), elements=st.floats(0, 1)))
def test_holm_lies_between_the_raw_p_and_bonferronis(p):
    corrected = s.holm(p)
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(p * len(p), 1)).all()
    assert (np.diff(corrected[np.argsort(p, kind='stable')]) >= 0).all()


@pytest.mark.parametrize(
    ('factors', 'outcome', 'effects'),
    [
        (
            {'dropout': [0.0, 0.25, 0.5], 'norm': ['none', 'batch']},
            lambda dropout, norm: 3 + 2 * dropout + (1 + dropout) * (norm == 'batch'),
            {
                'dropout=0.25': 0.625,
                'dropout=0.5': 1.25,
                'norm=batch': 1.25,
                'dropout=0.25 × norm=batch': 0.25,
                'dropout=0.5 × norm=batch': 0.5,  # the change of an effect
            },
        ),
        (
            {'a': [0, 1], 'b': [0, 1], 'c': [0, 1]},
            lambda a, b, c: a * b + 5 * c,
            {'a=1': 0.5, 'b=1': 0.5, 'c=1': 5, 'a=1 × b=1': 1},  # averaged over the third
        ),
    ],
)
def test_main_effects_and_interactions_by_hand(factors, outcome, effects):
    levels = [dict(zip(factors, x)) for x in itertools.product(*factors.values())]
    weights = s.contrasts(factors, levels, levels[0])
    y = np.array([outcome(**arm) for arm in levels])
    expected = dict.fromkeys(weights, 0) | effects
    assert {name: float(w @ y) for name, w in weights.items()} == pytest.approx(expected)
