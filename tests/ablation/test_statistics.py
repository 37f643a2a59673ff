"""Intervals cover, tests keep their level: on simulated data, by hand, and against SciPy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from cnn_jax.ablation import statistics as s

TRIALS = 2_000


def normal(n: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0.9, 0.01, (TRIALS, n))


def accuracies(n: int) -> tuple[np.ndarray, float]:
    """Accuracies on 1,000 test images of networks that differ by their seed, and their mean."""
    generator = np.random.default_rng(2)

    def rates(size):
        return 1 / (1 + np.exp(-generator.normal(3, 0.3, size)))

    return generator.binomial(1000, rates((TRIALS, n))) / 1000, rates(1_000_000).mean()


def coverage(intervals: np.ndarray, truth: float) -> float:
    return np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))


@pytest.mark.parametrize('n', [2, 3, 5, 10])
def test_t_interval_covers(n):
    assert 0.93 <= coverage(s.t_interval(normal(n)), 0.9) <= 0.97


@pytest.mark.parametrize('n', [5, 10])
def test_bootstrap_interval_covers_normal_values_and_skewed_accuracies(n):
    for sample, truth in ((normal(n), 0.9), accuracies(n)):
        assert 0.93 <= coverage(s.bootstrap_interval(sample, resamples=999), truth) <= 0.97


def test_paired_interval_cancels_what_the_seeds_share():
    generator = np.random.default_rng(3)
    shared = generator.normal(0, 0.05, (TRIALS, 5))
    baseline = shared + generator.normal(0, 0.002, (TRIALS, 5))
    arm = shared + generator.normal(0.003, 0.002, (TRIALS, 5))
    intervals = s.t_interval(arm - baseline)
    assert 0.93 <= coverage(intervals, 0.003) <= 0.97
    unpaired = stats.t.ppf(0.975, 8) * np.sqrt((arm.var(-1, ddof=1) + baseline.var(-1, ddof=1)) / 5)
    assert np.median(np.ptp(intervals, axis=-1) / (2 * unpaired)) < 0.1


@pytest.mark.parametrize('n', [2, 5, 10])
def test_paired_t_keeps_its_level(n):
    _, p = s.paired_t(normal(n) - 0.9)
    assert 0.03 <= np.mean(p < 0.05) <= 0.07


@pytest.mark.parametrize('n', [6, 8, 10])
def test_sign_flip_test_keeps_its_level(n):
    p = s.sign_flip_test(normal(n) - 0.9)
    # Exact: the chance is the largest attainable p value below 5%, 1/32 for six pairs.
    assert np.mean(p < 0.05) == pytest.approx(np.floor(0.05 * 2 ** (n - 1)) * 2 / 2**n, abs=0.015)


def test_family_of_four_arms_keeps_its_level_after_holm():
    generator = np.random.default_rng(4)
    baseline = generator.normal(size=(TRIALS, 1, 5))
    _, p = s.paired_t(generator.normal(size=(TRIALS, 4, 5)) - baseline)
    assert np.mean((np.apply_along_axis(s.holm, -1, p) < 0.05).any(-1)) <= 0.06
    assert np.mean((p < 0.05).any(-1)) > 0.08  # what the correction is for


def test_paired_t_and_its_interval_are_scipys():
    differences = np.random.default_rng(5).normal(0.3, 1, (20, 7))
    t, p = s.paired_t(differences)
    expected = stats.ttest_1samp(differences, 0, axis=-1)
    interval = expected.confidence_interval()
    np.testing.assert_allclose(t, expected.statistic, rtol=1e-12)
    np.testing.assert_allclose(p, expected.pvalue, rtol=1e-12)
    np.testing.assert_allclose(s.t_interval(differences).T, [interval.low, interval.high])


@pytest.mark.parametrize('n', [2, 5, 9])
@pytest.mark.parametrize('unit', [0, 0.001])
def test_sign_flip_test_counts_every_sign(n, unit):
    d = np.random.default_rng(6).normal(0.5, 1, n)
    if unit:  # as accuracies are: many sums are equal, and rounding must not tell them apart
        d = np.round(d * 3) * unit
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=n)]
    expected = np.mean(np.array(sums) >= abs(d.sum()) - 1e-12)
    assert s.sign_flip_test(d) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(('n', 'smallest'), [(5, 0.0625), (6, 0.03125), (30, 2e-4)])
def test_smallest_sign_flip_p_is_that_of_equal_signs(n, smallest):
    d = np.array([9.0, 8, 7, 9, 8, 8] * 5)[:n]
    assert s.sign_flip_test(d) == s.smallest_sign_flip_p(n) == smallest


def test_sign_flip_test_of_many_pairs_draws_its_signs():
    d = np.random.default_rng(7).normal(0.4, 1, 30)
    exact = stats.permutation_test(
        (d,), np.mean, permutation_type='samples', n_resamples=50_000, rng=0
    ).pvalue
    assert s.sign_flip_test(d) == pytest.approx(exact, abs=0.02)
    assert s.sign_flip_test(d) == s.sign_flip_test(d)


def test_constant_differences_have_no_t():
    for difference in (0.0, 0.1, 0.3):
        d = 0.9 + difference - np.full(5, 0.9)
        assert np.isnan(s.paired_t(d)[0])
        assert np.isnan(s.effect_size(d)[0])
    assert s.sign_flip_test(np.zeros(5)) == 1


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


values = hnp.arrays(
    float, st.integers(2, 12), elements=st.floats(-100, 100).map(lambda x: round(x, 3))
)


@given(values, st.floats(0.01, 100), st.floats(-100, 100))
def test_mean_interval_holds_the_mean_and_moves_with_the_unit(sample, scale, shift):
    low, high, method = s.mean_interval(sample)
    assert low - 1e-9 <= sample.mean() <= high + 1e-9
    assert np.isfinite([low, high]).all()
    assert method == 'Student t' or len(sample) >= s.BOOTSTRAP_FROM
    if np.ptp(sample) < 1e-3:
        return
    moved = s.mean_interval(scale * sample + shift)
    assert moved[2] == method
    expected = [scale * low + shift, scale * high + shift]
    np.testing.assert_allclose(moved[:2], expected, rtol=1e-6, atol=1e-6)


def test_four_equal_values_of_five_fall_back_to_student():
    assert s.mean_interval(np.array([0.9, 0.9, 0.9, 0.9, 0.8]))[2] == 'Student t'
    assert s.mean_interval(np.array([0.91, 0.9, 0.92, 0.93, 0.8]))[2] == 'studentized bootstrap'


def test_effect_size_by_hand():
    d, g = s.effect_size(np.array([1.0, 2.0, 3.0]))
    assert d == pytest.approx(2)
    assert g == pytest.approx(2 / np.sqrt(np.pi))  # J(2) = Γ(1)/(√1·Γ(½))
    d, g = s.effect_size(np.array([1.0, 2.0]))
    assert d == pytest.approx(1.5 * np.sqrt(2))
    assert np.isnan(g)


def test_hedges_g_is_unbiased():
    d, g = s.effect_size(np.random.default_rng(8).normal(0.8, 1, (200_000, 5)))
    assert g.mean() == pytest.approx(0.8, abs=0.01)
    assert d.mean() > 0.95


def test_mcnemar_by_hand():
    baseline = np.array([1] * 80 + [0] * 20)
    arm = np.array([1] * 78 + [0] * 2 + [1] * 9 + [0] * 11)
    answer = s.mcnemar(baseline, arm)
    assert (answer['only_baseline'], answer['only_arm']) == (2, 9)
    assert answer['disagreement'] == pytest.approx(0.11)
    assert answer['p'] == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert s.mcnemar(arm, arm)['p'] == 1


@pytest.mark.parametrize(('effect', 'seeds'), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_gpower(effect, seeds):
    assert s.seeds_needed(effect) == s.seeds_needed(-effect) == seeds


def test_seeds_needed_has_ends():
    assert s.seeds_needed(1e6) == 2
    assert s.seeds_needed(0) is None
    assert s.power(0, 5, 0.05) == pytest.approx(0.05)


@pytest.mark.parametrize('n', [2, 3, 5, 20])
@pytest.mark.parametrize('significance', [0.05, 0.0125])
def test_detectable_effect_is_detected_in_four_of_five_simulations(n, significance):
    effect = s.detectable_effect(n, significance)
    _, p = s.paired_t(np.random.default_rng(0).normal(effect, 1, (50_000, n)))
    assert np.mean(p < significance) == pytest.approx(0.8, abs=0.01)


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
