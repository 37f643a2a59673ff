"""Intervals cover, tests keep their level, looks cost nothing: by hand, tables, simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from cnn_jax.ablation import statistics as s
from tests.ablation import simulation

LAN_DEMETS = {  # two-sided boundaries for five equal looks at 5%, as published
    'obrien_fleming': [4.8769, 3.3569, 2.6803, 2.2898, 2.0310],
    'pocock': [2.4380, 2.4268, 2.4101, 2.3966, 2.3859],
}


def test_t_interval_is_scipys():
    values = np.random.default_rng(5).normal(0.3, 1, (20, 7))
    expected = stats.ttest_1samp(values, 0, axis=-1).confidence_interval()
    np.testing.assert_allclose(s.t_interval(values).T, [expected.low, expected.high])


@pytest.mark.parametrize('classes', [2, 10])
def test_a_failed_replicate_is_worth_equal_probabilities(classes):
    labels, p = np.arange(classes), np.full((classes, classes), 1 / classes)
    found = s.guess(classes)
    assert found['loss'] == pytest.approx(-np.log(p[labels, labels]).mean())
    assert found['accuracy'] == pytest.approx(p[labels, labels].mean())
    assert found['calibration_error'] == 1 - found['accuracy']  # as if it had been sure
    assert found['top5'] == pytest.approx(np.sort(p)[:, -5:].sum(-1).mean())


def test_wins_are_clopper_and_pearsons_and_a_tie_is_half_a_win():
    failing = np.array([0.01] * 18 + [-0.8] * 2)  # wins most replicates, loses on average
    exact = stats.beta.ppf([0.025, 0.975], [18, 19], [3, 2])
    np.testing.assert_allclose(s.wins(failing), [0.9, *exact])
    share, low, high = s.wins(np.array([1.0, 1, 1, 0, -1]))
    assert share == 0.7
    assert low == pytest.approx(stats.binomtest(3, 5).proportion_ci().low)
    assert high == pytest.approx(stats.binomtest(4, 5).proportion_ci().high)


def test_crossed_variance_is_that_of_the_two_way_table():
    n, e = 4, 6
    table = np.random.default_rng(0).normal(size=(n, e)) + 3 * np.arange(e)
    rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    ms_a = e * ((rows - table.mean()) ** 2).sum() / (n - 1)
    ms_b = n * ((columns - table.mean()) ** 2).sum() / (e - 1)
    ms_e = ((table - rows - columns + table.mean()) ** 2).sum() / ((n - 1) * (e - 1))
    replicates, images, noise = s.crossed_variance(table)
    assert replicates * n * e == pytest.approx(ms_a)
    assert images * n * e == pytest.approx(ms_b - ms_e)
    squares = ms_b**2 / (e - 1) + ms_e**2 / ((n - 1) * (e - 1))
    assert noise * (n * e) ** 2 == pytest.approx(squares)

    r = np.random.default_rng(1)  # Owen's pigeonhole bootstrap draws rows and columns apart
    draws = (table[r.integers(n, size=n)][:, r.integers(e, size=e)].mean() for _ in range(20_000))
    owen = ((n - 1) / n * ms_a + (e - 1) / e * ms_b + (n - 1) * (e - 1) / (n * e) * ms_e) / (n * e)
    assert np.var(list(draws)) == pytest.approx(owen, rel=0.04)


def test_crossed_variance_is_unbiased():
    r, (trials, n, e) = np.random.default_rng(2), (3000, 5, 40)
    a, b = r.normal(size=(trials, n, 1)), 3 * r.exponential(size=(trials, 1, e))
    table = a + b + 2 * r.normal(size=(trials, n, e)) * r.random((trials, 1, e))
    found = sum(s.crossed_variance(table)[:2])
    assert np.mean(found) == pytest.approx(table.mean((1, 2)).var(), rel=0.06)


@pytest.mark.parametrize(('d0', 'd'), [(4, 4), (4, 29), (20, 9)])
def test_prior_finds_what_the_variances_were_drawn_from(d0, d):
    r = np.random.default_rng(3)
    true = 2.5 * d0 / r.chisquare(d0, (50, 2000))
    found = s.prior(true * r.chisquare(d, true.shape) / d, np.full(true.shape, d))
    np.testing.assert_allclose(np.median(found, axis=-1), [d0, 2.5], rtol=0.1)


def test_prior_solves_smyths_equations():
    variances, df = np.array([0.1, 2.0, 30.0, 0.0, np.nan]), np.array([4.0, 9.0, 4.0, 4.0, 0.0])
    d0, s0 = s.prior(variances, df)
    logs, half = np.log(variances[:3]), df[:3] / 2
    assert logs.mean() == pytest.approx(
        np.mean(special.digamma(half) - np.log(half))
        + np.log(s0) - special.digamma(d0 / 2) + np.log(d0 / 2)
    )  # fmt: skip
    spread = (logs - special.digamma(half) + np.log(half)).var(ddof=1)
    assert spread == pytest.approx(special.polygamma(1, half).mean() + special.polygamma(1, d0 / 2))
    assert s.prior(variances[1:], df[1:])[0] == 0


variances = hnp.arrays(float, st.integers(1, 8), elements=st.floats(1e-3, 1e3))


@given(variances, st.floats(0.01, 100))
def test_moderation_only_raises_and_knows_no_unit(own, unit):
    df = np.full(len(own), 4.0)
    shared, freedom = s.moderate(own, df)
    assert (shared >= own).all()
    assert ((freedom > df) == (shared > own)).all()
    assert (freedom <= df.sum() + 1e-9).all()  # no more than all comparisons have
    np.testing.assert_allclose(s.moderate(own * unit, df)[0], shared * unit, rtol=1e-6)
    if len(own) < 3:
        np.testing.assert_array_equal(shared, own)


def test_spending_is_lan_and_demets():
    for spending, published in LAN_DEMETS.items():
        found = special.ndtri(1 - np.array(s.nominal_levels((1, 2, 3, 4, 5), 0.05, spending)) / 2)
        np.testing.assert_allclose(found, published, atol=2e-4)


@pytest.mark.parametrize('spending', s.SPENDING)
@pytest.mark.parametrize('looks', [(7,), (5, 10), (5, 10, 20, 30), (4, 5, 30)])
def test_looks_together_spend_the_error_and_no_more(spending, looks):
    levels = s.nominal_levels(looks, 0.02, spending)
    c = special.ndtri(1 - np.array(levels) / 2)
    n = np.array(looks)
    paths = np.sqrt(np.minimum(n, n[:, None]) / np.maximum(n, n[:, None]))
    inside = stats.multivariate_normal(cov=paths).cdf(c, lower_limit=-c, rng=0)
    assert inside == pytest.approx(0.98, abs=2e-5)
    if len(looks) == 1:
        assert levels == pytest.approx((0.02,))


@given(st.integers(1, 20), st.floats(1e-5, 1))
def test_adjusted_p_of_one_look_is_bonferronis(comparisons, p):
    design = s.Design(comparisons, (10,))
    expected = comparisons * p if comparisons * p < 0.99 else 1
    assert design.adjusted(np.array(p), 0) == pytest.approx(expected, rel=1e-9, abs=1e-6)


samples = hnp.arrays(
    float, (3, 12), elements=st.floats(-100, 100).map(lambda x: round(x, 3)), unique=True
)


@given(samples, st.floats(1e-6, 0.5))
def test_an_interval_excludes_0_exactly_where_p_is_below_its_level(values, level):
    found = s.estimate(values, values.var(-1, ddof=1), np.full(3, 11.0))
    low, high = found.interval(level)
    p, near = found.p_value(), 1e-6 * (high - low)
    out = (low > near) | (high < -near)
    within = (low < -near) & (high > near)
    assert (p[out] < level).all()
    assert (p[within] > level).all()


def test_an_interval_is_students_or_halls_whichever_is_farther():
    skewed = np.array([0.1, 0.2, 0.3, 0.5, 0.9, 4.0])
    sample = np.stack([skewed, skewed[::-1] * -1, np.array([-3.0, -2, -1, 1, 2, 3]) + 5])
    found = s.estimate(sample, sample.var(-1, ddof=1), np.full(3, 5.0))
    low, high = found.interval(0.05)
    student = s.t_interval(sample)
    np.testing.assert_allclose(low[[0, 2]], student[[0, 2], 0])  # the short tail's end
    np.testing.assert_allclose(high[[1, 2]], student[[1, 2], 1])
    assert low[1] == pytest.approx(-high[0])
    g = stats.skew(skewed, bias=False) / np.sqrt(6)
    t = (skewed.mean() - high[0]) / stats.sem(skewed)
    h = t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6
    assert h == pytest.approx(-stats.t.isf(0.025, 5))
    assert t < h


def test_equivalence_is_two_one_sided_tests():
    values = np.random.default_rng(4).normal(0.1, 0.4, (300, 1, 12))
    values = np.concatenate([values, 0.2 - values], -1)  # symmetric, so that Hall's is Student's
    found = s.decide(values, s.Design(1, (24,)), margin=0.2)
    above = stats.ttest_1samp(values, -0.2, axis=-1, alternative='greater').pvalue
    below = stats.ttest_1samp(values, 0.2, axis=-1, alternative='less').pvalue
    equivalent = np.maximum(above, below) < 0.025
    assert 0 < equivalent.sum() < 300
    decided = np.isin(found.verdict, ['better', 'worse'])
    np.testing.assert_array_equal(found.verdict == 'equivalent', equivalent & ~decided)


def study(seed: int, arms: int = 5) -> np.ndarray:
    """Differences of 30 replicates of arms of several effects and spreads."""
    r = np.random.default_rng(seed)
    effects = r.choice([0, 0, 0.5, 1, -2, 4], (arms, 1))
    return r.exponential(size=(arms, 30)) - 1 + effects * r.choice([0.2, 1, 3], (arms, 1))


designs = st.builds(
    s.Design,
    st.sampled_from([5, 10]),
    st.sampled_from([(30,), (5, 10, 20, 30), (10, 20)]),
    st.sampled_from([*s.SPENDING]),
    st.booleans(),
)


@given(st.integers(0, 10_000), designs, st.sampled_from([1, -1]))
def test_a_verdict_is_read_off_its_interval(seed, design, sign):
    found = s.decide(study(seed), design, margin=1.5, sign=sign)
    for kind, low, high, p in zip(found.verdict, found.low, found.high, found.p):
        assert (low > 0 or high < 0) == (kind in ('better', 'worse')) == (p < s.SIGNIFICANCE)
        assert (kind == 'better') == (low > 0 if sign > 0 else high < 0)
        assert (kind == 'undecided') == (low <= 0 <= high and not -1.5 < low <= high < 1.5)
        assert low <= high


@given(st.integers(0, 10_000), designs, st.integers(1, 30))
def test_a_resumed_study_gives_the_answer_of_one_that_ran_through(seed, design, n):
    values = study(seed)
    early = np.where(np.arange(30) < n, values, np.nan)
    then, cut = (s.decide(each, design, margin=1.5) for each in (early, values[:, :n]))
    for one, other in zip(then, cut):
        np.testing.assert_array_equal(one, other)
    now = s.decide(values, design, margin=1.5)
    assert (now.low >= then.low).all()
    assert (now.high <= then.high).all()
    assert (now.p <= then.p).all()
    stays = then.decided > 0
    np.testing.assert_array_equal(now.decided[stays], then.decided[stays])
    signs = np.isin(then.verdict, ['better', 'worse'])
    np.testing.assert_array_equal(now.verdict[signs], then.verdict[signs])
    stopped, last = simulation.stopped(values, design, margin=1.5)
    again = s.decide(stopped, design, margin=1.5)
    for one, other in zip(last, again):
        np.testing.assert_array_equal(one, other)


@given(st.integers(0, 10_000), designs, st.permutations(range(5)), st.floats(0.01, 100))
def test_neither_unit_nor_order_of_the_arms_matters(seed, design, order, unit):
    values = study(seed)
    found = s.decide(values, design, margin=1.5)
    other = s.decide(-unit * values[list(order)], design, margin=1.5 * unit, sign=-1)
    np.testing.assert_array_equal(other.verdict, found.verdict[list(order)])
    np.testing.assert_allclose(-other.high, unit * found.low[list(order)], rtol=1e-6)
    np.testing.assert_allclose(other.p, found.p[list(order)], rtol=1e-5)


def test_equal_arms_are_equivalent_and_equal_differences_say_nothing():
    values = np.stack([np.zeros(10), np.full(10, 0.9 - 0.8)])
    found = s.decide(values, s.Design(2, (5, 10)), margin=0.01)
    assert found.verdict.tolist() == ['equivalent', 'undecided']
    assert (found.low[0], found.high[0], found.p[0]) == (0, 0, 1)
    assert (found.low[1], found.high[1], found.p[1]) == (-np.inf, np.inf, 1)


def test_a_replicate_that_has_not_run_holds_its_arm_back_alone():
    values = study(1)
    values[2, 7] = np.nan
    found = s.decide(values, s.Design(5))
    assert found.replicates.tolist() == [30, 30, 5, 30, 30]
    assert s.decide(values[:, :4], s.Design(5)).verdict.tolist() == ['undecided'] * 5


def test_overlapping_training_sets_widen_by_nadeau_and_bengio():
    differences = np.random.default_rng(0).normal(1, 1, (1, 5))
    plain, folds = (s.Design(1, (5,), overlap=rho) for rho in (0.0, 1 / 4))
    ratio = s.decide(differences, folds).at.error / s.decide(differences, plain).at.error
    np.testing.assert_allclose(ratio, np.sqrt((1 / 5 + 1 / 4) / (1 / 5)))


def test_an_arm_that_fails_twice_is_judged_on_all_its_replicates():
    r = np.random.default_rng(6)
    accuracy = r.normal([[0.90], [0.93]], 0.005, (2, 20))
    design = s.Design(1, (20,))
    assert s.decide(accuracy[1:] - accuracy[0], design).verdict.tolist() == ['better']
    accuracy[1, [4, 11]] = s.guess(10)['accuracy']
    found = s.decide(accuracy[1:] - accuracy[0], design)
    assert found.verdict.tolist() == ['undecided']
    assert found.at.mean < 0
    assert s.wins(accuracy[1] - accuracy[0])[1] > 0.6  # what is said beside it


def test_images_widen_an_interval_by_what_they_vary():
    r = np.random.default_rng(7)
    replicates = r.normal(0, 0.01, (1, 10, 1))
    images = r.normal(0, 1, (1, 1, 400))
    for table, wider in ((replicates + 0 * images, False), (replicates + images, True)):
        rows = table.mean(-1)
        alone, both = (s.decide(rows, s.Design(1, (10,)), per_image=each) for each in (None, table))
        expected = rows.var(ddof=1) / 10 + wider * images.var(ddof=1) / 400
        assert both.at.error**2 == pytest.approx(expected, rel=0.01)
        assert (both.at.df > 100) == wider
        assert (both.high - both.low >= alone.high - alone.low - 1e-12).all()


@pytest.mark.parametrize(
    ('draw', 'design'),
    [
        ('normal', s.Design(4)),
        ('normal', s.Design(10, spending='obrien_fleming')),
        ('normal, one arm 5 times as variable', s.Design(10, spending='pocock')),
        ('exponential', s.Design(10)),
    ],
)
def test_families_keep_their_error_through_all_looks(draw, design):
    assert simulation.misses(draw, design, 500) <= 8  # three standard errors above 5


def test_looks_use_the_error_that_they_may():
    design = s.Design(10, spending='pocock', moderated=False)
    values = np.random.default_rng(0).normal(size=(2000, 10, 30))
    found = s.decide(values, design)
    assert 0.025 <= np.mean(((found.low > 0) | (found.high < 0)).any(-1)) <= 0.055
    each = s.estimate(values, values.var(-1, ddof=1), np.full((2000, 10), 29.0)).interval(0.005)
    assert 0.03 <= np.mean(((each[0] > 0) | (each[1] < 0)).any(-1)) <= 0.06  # the last look alone


@pytest.mark.parametrize('n', [5, 10, 30])
def test_one_interval_covers(n):
    values = np.random.default_rng(n).normal(0.9, 0.01, (4000, 1, n))
    found = s.decide(values, s.Design(1, (n,)))
    assert 0.94 <= np.mean((found.low <= 0.9) & (found.high >= 0.9)) <= 0.975


@pytest.mark.slow
def test_families_keep_their_error_whatever_the_differences_are():
    for m, draw in itertools.product((4, 10), simulation.DRAWS):
        if draw not in simulation.UNSEEN:
            assert simulation.misses(draw, s.Design(m), 2500) <= 6, (m, draw)


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
