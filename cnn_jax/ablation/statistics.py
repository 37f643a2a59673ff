"""Inference over replicates and test images: intervals, verdicts, sequential looks, contrasts.

A replicate draws a training subset, initial weights, order and augmentation, the same for all arms;
arms are compared by their difference in each replicate. A family is every arm in every primary
measure. With a probability of at least 95% the intervals of all its comparisons, at all looks,
hold the true mean differences, and each verdict is read off its interval.

Arrays may have leading axes `*b`; then follow comparisons m, replicates n, test images e.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special, stats

from cnn_jax.ablation.plan import LOOKS

SIGNIFICANCE = 0.05
VERDICTS = ['better', 'worse', 'equivalent']
NODES, WEIGHTS = np.polynomial.legendre.leggauss(128)
SPENDING = {  # the error α spent by the fraction t of the planned replicates
    'cube': lambda t, a: a * t**3,
    'obrien_fleming': lambda t, a: 4 * special.ndtr(special.ndtri(a / 4) / np.sqrt(t)),
    'pocock': lambda t, a: a * np.log1p((np.e - 1) * t),
}


def t_interval(values: Float[np.ndarray, '*b n']) -> Float[np.ndarray, '*b 2']:
    """Student's 95% confidence interval of the mean of at least two values.

    x̄ ± t(0.975; n−1)·s/√n
    """
    half = stats.t.isf(SIGNIFICANCE / 2, values.shape[-1] - 1) * stats.sem(values, axis=-1)
    return values.mean(-1)[..., None] + np.stack([-half, half], axis=-1)


def is_constant(values: Float[np.ndarray, '*b n']) -> Bool[np.ndarray, '*b']:
    """Tell whether all values are equal up to rounding."""
    return np.ptp(values, axis=-1) <= 1e-9 * np.abs(values).max(-1)


def guess(classes: int) -> dict[str, float]:
    """The results, on average and for each image, of a replicate whose training failed.

    A failed network is worth a guess, p(k) = 1/K: accuracy 1/K, loss ln K. So an arm that diverges
    in 2 of 20 replicates is judged on all 20. Its calibration error is the largest of a guesser,
    that of a sure one: by that of 1/K, which is 0, an arm would be the better for diverging.
    """
    accuracy, top5, loss = 1 / classes, min(5, classes) / classes, float(np.log(classes))
    return {'accuracy': accuracy, 'top5': top5, 'loss': loss, 'calibration_error': 1 - accuracy}


def wins(differences: Float[np.ndarray, ' n']) -> tuple[float, float, float]:
    """The share of replicates in which an arm does better; lower and upper end, exact, 95%.

    A check that outliers cannot sway, of the sign alone: an arm that seldom fails can win most
    replicates and lose on average. Differences are positive where the arm is better. A tie is half
    a win, and the interval covers both ways to count it.

    Source: Clopper & Pearson 1934; P(A > B) of Bouthillier et al. 2021 (arXiv 2103.03098).
    """
    n, won, kept = len(differences), int((differences > 0).sum()), int((differences >= 0).sum())
    low, high = (stats.binomtest(count, n).proportion_ci() for count in (won, kept))
    return (won + kept) / (2 * n), float(low.low), float(high.high)


def crossed_variance(
    per_image: Float[np.ndarray, '*b n e'],
) -> tuple[Float[np.ndarray, '*b'], Float[np.ndarray, '*b'], Float[np.ndarray, '*b']]:
    """The parts of the variance of a mean over replicates crossed with test images.

    d_ri = μ + a_r + b_i + ε_ri:  V = σ²_a/n + σ²_b/e + σ²_ε/(n·e), estimated from the mean
    squares of the two-way table as (MS_a + max(0, MS_b − MS_ε))/(n·e)

    MS_a/(n·e), s²/n of the replicates' means, alone speaks of other replicates on these very
    images, V of other replicates on other images of the same source. Any table whose rows and
    columns are drawn independently has such terms, uncorrelated but not of equal variance.

    Args:
        per_image: A difference for each replicate and test image, the same images in each.

    Returns:
        MS_a/(n·e), with n − 1 degrees of freedom; what the images add; half this one's variance.

    Source: Searle, Casella & McCulloch 1992, "Variance Components", chapter 4. The pigeonhole
    bootstrap (Owen 2007) has nearly (MS_a + MS_b + MS_ε)/(n·e), on the safe side.
    """
    n, e = per_image.shape[-2:]
    degrees = (n - 1) * (e - 1)
    rows = per_image.mean(-1, dtype=float).var(-1, ddof=1) / n
    columns = per_image.mean(-2, dtype=float).var(-1, ddof=1) / e
    rest = per_image.var((-2, -1), dtype=float) - rows * (n - 1) - columns * (e - 1)
    residual = np.maximum(rest, 0) / degrees
    noise = columns**2 / (e - 1) + residual**2 / degrees
    return rows, np.maximum(columns - residual, 0), noise


def prior(
    variances: Float[np.ndarray, '*b m'], df: Float[np.ndarray, '*b m']
) -> tuple[Float[np.ndarray, '*b'], Float[np.ndarray, '*b']]:
    """Smyth's prior d₀ and s₀² of the variances; d₀ = 0 where fewer than three count.

    s² ~ s₀²·F(d, d₀): E ln s² = ln s₀² + ψ(d/2) − ln(d/2) − ψ(d₀/2) + ln(d₀/2) and
    Var ln s² = ψ′(d/2) + ψ′(d₀/2), solved for d₀ by the inverse of ψ′, then for s₀²

    Args:
        variances, df: s² and d of each comparison; those with s² = 0 or d = 0 do not count.

    Source: Smyth 2004, "Linear models and empirical Bayes methods for assessing differential
    expression in microarray experiments", section 6.2.
    """
    counts = (variances > 0) & (df > 0)
    m = counts.sum(-1)
    half = np.where(counts, df, 2) / 2
    logs = np.log(np.where(counts, variances, 1)) - special.digamma(half) + np.log(half)
    mean = np.sum(logs, -1, where=counts) / np.maximum(m, 1)
    squares = np.sum((logs - mean[..., None]) ** 2, -1, where=counts) / np.maximum(m - 1, 1)
    expected = np.sum(special.polygamma(1, half), -1, where=counts) / np.maximum(m, 1)
    excess = np.maximum(squares - expected, 1e-3)
    y = 0.5 + 1 / excess
    for _ in range(10):  # Newton's steps on the convex 1/ψ′(y), so that none overshoots
        slope = special.polygamma(1, y)
        y += slope * (1 - slope / excess) / special.polygamma(2, y)
    return np.where(m < 3, 0, 2 * y), np.exp(mean + special.digamma(y) - np.log(y))


def moderate(
    variances: Float[np.ndarray, '*b m'], df: Float[np.ndarray, '*b m']
) -> tuple[Float[np.ndarray, '*b m'], Float[np.ndarray, '*b m']]:
    """Raise variances that came out small by chance towards those of the other comparisons.

    s̃² = max(s², (d₀s₀² + d·s²)/(d₀ + d)), with d₀ + d degrees of freedom where raised, else d

    Smyth's s̃² also lowers large ones. With d₀ estimated from 4 or 10 arms of unequal spread that
    errs in up to 9% of families instead of 5 (docs/statistics.md). Raising alone keeps the level,
    and helps where replicates are few. d₀ is at most the other comparisons' degrees together.

    Args:
        variances, df: As for `prior`; of one measure, so that they share a unit.
    """
    d0, s0 = (each[..., None] for each in prior(variances, df))
    counted = np.where(variances > 0, df, 0)
    d0 = np.minimum(d0, counted.sum(-1, keepdims=True) - counted)
    shared = (d0 * s0 + df * variances) / np.maximum(d0 + df, 1)
    return np.maximum(variances, shared), np.where(shared > variances, d0 + df, df)


@functools.cache
def nominal_levels(looks: tuple[int, ...], alpha: float, spending: str) -> tuple[float, ...]:
    """The two-sided level of the test at each look, so that all looks together err with α.

    P(|Z₁| < c₁, …, |Z_{k−1}| < c_{k−1}, |Z_k| ≥ c_k) = f(n_k/n_K) − f(n_{k−1}/n_K),
    level_k = 2Φ(−c_k), by Armitage, McPherson & Rowe's recursion over the path of Z√n

    t's quantile at these levels is the critical value; the normal c errs more with few replicates.
    Test images make looks more alike, and err less.

    Args:
        looks: Replicates n_k at each look, increasing; the last is the planned end.
        alpha: α of one comparison.
        spending: f, a key of `SPENDING`.

    Source: Lan & DeMets 1983, "Discrete sequential boundaries for clinical trials"; Jennison &
    Turnbull 2000, "Group Sequential Methods", sections 3.8, 7.2 and 19.2.
    """
    fractions = np.array(looks) / looks[-1]
    path, density, before, levels = np.zeros(1), np.ones(1), 0.0, []
    for t, spent in zip(fractions, np.diff(SPENDING[spending](fractions, alpha), prepend=0)):
        step = np.sqrt(t - before)
        c = optimize.root_scalar(_excess, (path, density, step, spent), bracket=(1e-9, 37.0)).root
        levels.append(float(2 * special.ndtr(-c / np.sqrt(t))))
        end = min(c, 9 * np.sqrt(t))  # there is no weight beyond 9 standard deviations
        moves = np.exp(-(((end * NODES[:, None] - path) / step) ** 2) / 2) @ density
        density = moves * WEIGHTS * end / (np.sqrt(2 * np.pi) * step)
        path, before = end * NODES, t
    return tuple(levels)


def _excess(c: float, path: np.ndarray, density: np.ndarray, step: float, spent: float) -> float:
    """ln P(the next step ends beyond ±c) − ln of the error to be spent on it."""
    outside = density @ (special.ndtr((path - c) / step) + special.ndtr((-path - c) / step))
    return np.log(max(outside, 1e-300)) - np.log(spent)


@dataclass(frozen=True)
class Design:
    """The rules by which a family is decided, declared before its first result."""

    comparisons: int  # size m of the family: arms × primary measures
    # Replicates at each look; one look is a study of fixed size. Together they hold if they were
    # planned: a last look that is raised because of what it showed errs more.
    looks: tuple[int, ...] = LOOKS
    spending: str = 'cube'  # how much of the error early looks may spend, a key of `SPENDING`
    moderated: bool = True  # whether the comparisons share their variances (`moderate`)
    # ρ = test images a training image, where replicates train on each other's test images as folds
    # do: the variance of a mean is then s²·(1/n + ρ) instead of s²/n (Nadeau & Bengio 2003,
    # "Inference for the generalization error").
    overlap: float = 0.0

    def levels(self, alpha: float = SIGNIFICANCE) -> tuple[float, ...]:
        """The level of a comparison's test at each look, by Bonferroni's α/m."""
        return nominal_levels(self.looks, alpha / self.comparisons, self.spending)

    def adjusted(self, p: Float[np.ndarray, '*b'], look: int) -> Float[np.ndarray, '*b']:
        """Adjusted p values: the smallest α of the family at which plain p at this look reject."""
        alphas = np.unique([*np.geomspace(1e-6, 0.99, 48), SIGNIFICANCE])
        levels = [self.levels(float(alpha))[look] for alpha in alphas]
        found = np.exp(np.interp(np.log(p + 1e-300), np.log(levels), np.log(alphas)))
        return np.where(p > levels[-1], 1.0, found)


class Estimate(NamedTuple):
    """Mean differences: standard errors, their degrees of freedom, and the means' skewness."""

    mean: Float[np.ndarray, '*b m']
    error: Float[np.ndarray, '*b m']
    df: Float[np.ndarray, '*b m']
    skewness: Float[np.ndarray, '*b m']

    def interval(self, level: float) -> tuple[Float[np.ndarray, '*b m'], Float[np.ndarray, '*b m']]:
        """The confidence interval at a two-sided level; of Student's and Hall's the farther ends.

        x̄ ± c·se, c = t(1 − level/2; df);  x̄ − se·h⁻¹(±c), h(T) = T + γT²/3 + γ²T³/27 + γ/6

        Student's errs where differences are skewed, as where an arm fails at times, Hall's where
        tails are long.

        Source: Student 1908; Hall 1992, "On the removal of skewness by transformation".
        """
        c = stats.t.isf(level / 2, self.df)
        curved = np.abs(self.skewness) > 1e-6
        g = np.where(curved, self.skewness, 1)
        most, least = (
            np.where(curved, 3 / g * (np.cbrt(1 + g * (y - g / 6)) - 1), y) for y in (c, -c)
        )
        low = self.mean - np.maximum(c, most) * self.error
        return low, self.mean + np.maximum(c, -least) * self.error

    def p_value(self) -> Float[np.ndarray, '*b m']:
        """The smallest level at which `interval` excludes 0."""
        t = self.mean / np.where(self.error > 0, self.error, np.inf)
        h = t + self.skewness * t**2 / 3 + self.skewness**2 * t**3 / 27 + self.skewness / 6
        return 2 * stats.t.sf(np.clip(np.sign(t) * h, 0, np.abs(t)), self.df)


def estimate(
    differences: Float[np.ndarray, '*b m n'],
    variances: Float[np.ndarray, '*b m'],
    df: Float[np.ndarray, '*b m'],
    per_image: Float[np.ndarray, '*b m n e'] | None = None,
) -> Estimate:
    """Estimate mean differences, over replicates or over replicates and test images.

    V = s̃²/n + V_images, df = V²/((s̃²/n)²/d + Var(V_images)/2), γ = k₃/(n²·(s²/n + V_images)^1.5)

    Differences that are all equal, but not 0, have an infinite error: they say nothing of others.

    Args:
        differences, per_image: As for `decide`.
        variances, df: s̃² and d of the replicates, moderated or not.

    Source: Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    n = differences.shape[-1]
    own, known = differences.var(-1, ddof=1) / n, variances > 0
    images, noise = (own * 0, own * 0) if per_image is None else crossed_variance(per_image)[1:]
    total = np.where(known, variances / n + images, 0)
    squares = (variances / n) ** 2 / np.maximum(df, 1) + np.where(images > 0, noise, 0)
    freedom = np.where(known, total**2 / np.where(known, squares, 1), 1)
    third = stats.kstat(differences, 3, axis=-1) if n > 2 else own * 0
    varied = known & ~is_constant(differences)
    skewness = np.where(varied, third / (n**2 * np.where(varied, own + images, 1) ** 1.5), 0)
    mean = differences.mean(-1)
    error = np.where(known | (mean == 0), np.sqrt(total), np.inf)
    return Estimate(mean, error, freedom, skewness)


class Decisions(NamedTuple):
    """The answers to the comparisons of one measure."""

    verdict: np.ndarray  # better | worse | equivalent | undecided
    decided: Int[np.ndarray, '*b m']  # replicates at the look that decided; 0 if none did
    replicates: Int[np.ndarray, '*b m']  # at the latest look; 0 before the first
    low: Float[np.ndarray, '*b m']  # simultaneous interval: what those of all looks share
    high: Float[np.ndarray, '*b m']
    p: Float[np.ndarray, '*b m']  # adjusted p value, below α exactly where the interval excludes 0
    at: Estimate  # at the latest look


def decide(
    differences: Float[np.ndarray, '*b m n'],
    design: Design,
    *,
    margin: float = 0.0,
    sign: int = 1,
    per_image: Float[np.ndarray, '*b m n e'] | None = None,
) -> Decisions:
    """Decide the comparisons of one measure from the replicates that have finished.

    better: low > 0; worse: high < 0; equivalent: −δ < low and high < δ, two one-sided tests in
    one; else undecided, and worth the replicates up to the next look

    Complete looks count, one after the other, so that the same differences give the same answer
    however often it is asked for. A decided comparison stays decided.

    Args:
        differences: Arm minus control in each replicate of the plan; NaN where it has not run. A
            failed one has the values of a `guess`. Effects of a grid are `contrasts` of arms.
        design: The rules of the family, to which the comparisons of all primaries belong.
        margin: δ in the measure's unit; nothing is equivalent within 0.
        sign: 1 where higher is better, −1 where lower is.
        per_image: The same differences for each test image. The answer then speaks of other
            replicates and images, else of other replicates on these images.

    Example:
        >>> arms = np.array([[1.0, 1.2, 0.9, 1.1, 0.8], [0.1, -0.2, 0.0, 0.2, -0.1]])
        >>> decide(arms, Design(comparisons=2, looks=(5,)), margin=0.8).verdict.tolist()
        ['better', 'equivalent']

    Source: Jennison & Turnbull 1989, "Interim analyses: the repeated confidence interval approach";
    Schuirmann 1987, "A comparison of the two one-sided tests procedure".
    """
    shape = differences.shape[:-1]
    at = Estimate(*np.full((4, *shape), np.nan))
    low, high, p = np.full(shape, -np.inf), np.full(shape, np.inf), np.ones(shape)
    verdict = np.full(shape, 'undecided')
    decided, replicates = np.zeros((2, *shape), int)
    variances, df = np.zeros((2, *shape))
    for look, (n, level) in enumerate(zip(design.looks, design.levels())):
        part = differences[..., :n]
        known = np.isfinite(part).all(-1) & (part.shape[-1] == n)
        images = None if per_image is None else per_image[..., :n, :]
        if not known.any():
            break
        spread = np.where(is_constant(part), 0, part.var(-1, ddof=1))
        variances, df = np.where(known, spread, variances), np.where(known, n - 1, df)
        shared, freedom = moderate(variances, df) if design.moderated else (variances, df)
        shared = shared * (1 + n * design.overlap)
        same = ((part if images is None else images.any(-1)) == 0).all(-1)  # no bit differs
        now = estimate(part, np.where(same, 0, shared), freedom, images)
        least, most = now.interval(level)
        use = known & (least <= high) & (low <= most)
        low = np.where(use, np.maximum(low, least), low)
        high = np.where(use, np.minimum(high, most), high)
        p = np.where(use, np.minimum(p, design.adjusted(now.p_value(), look)), p)
        at = Estimate(*(np.where(known, new, old) for new, old in zip(now, at)))
        replicates = np.where(known, n, replicates)
        better, worse = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
        within = (-margin < low) & (high < margin)
        verdict = np.select([better, worse, within], VERDICTS, 'undecided')
        decided = np.where((decided == 0) & (verdict != 'undecided'), n, decided)
    return Decisions(verdict, decided, replicates, low, high, p, at)


def contrasts(
    factors: dict[str, list[Any]], levels: list[dict[str, Any]], reference: dict[str, Any]
) -> dict[str, Float[np.ndarray, ' a']]:
    """The weights over arms of every main effect and two-factor interaction of a factorial grid.

    Main effect of level a of factor A: mean over the other factors of y(a, ·) − y(a₀, ·).
    Interaction of a and b: mean of [y(a, b) − y(a₀, b)] − [y(a, b₀) − y(a₀, b₀)], the amount by
    which a's effect changes when b is there, too. a₀ and b₀ are the reference levels.

    Args:
        factors: Levels by factor.
        levels: The level of each factor in each arm; a full grid has every combination once.
        reference: The level of each factor that the others are compared with.

    Returns:
        Weights by effect, e.g. `dropout=0.5` and `dropout=0.5 × norm=batch`: `weights @ results`
        of arms × replicates are an effect's differences, which `decide` judges.

    Source: Montgomery 2017, "Design and Analysis of Experiments", chapter 5.
    """
    effects = {
        f: {
            f'{f}={x}': np.array([float(a[f] == x) - (a[f] == reference[f]) for a in levels])
            for x in factors[f]
            if x != reference[f]
        }
        for f in factors
    }
    found = {name: w / (w > 0).sum() for each in effects.values() for name, w in each.items()}
    for one, other in itertools.combinations(effects.values(), 2):
        for (name_a, a), (name_b, b) in itertools.product(one.items(), other.items()):
            both = ((a > 0) & (b > 0)).sum()
            found[f'{name_a} × {name_b}'] = a * b / both
    return found
