"""Inference over seeds: intervals, paired tests, correction, contrasts.

A seed fixes data order, initial weights and augmentation in every arm, so two arms are compared
by their difference at each seed; what the seeds share cancels.

Functions take the seeds on the last axis and any number of leading axes where their shapes say so.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05

Levels = dict[str, Any]


def t_interval(values: Float[np.ndarray, '*b n']) -> Float[np.ndarray, '*b 2']:
    """Student's 95% confidence interval of the mean.

    x̄ ± t(0.975; n−1)·s/√n

    Args:
        values: At least two on the last axis.
    """
    half = stats.t.ppf((1 + CONFIDENCE) / 2, values.shape[-1] - 1) * stats.sem(values, axis=-1)
    mean = values.mean(-1)
    return np.stack([mean - half, mean + half], axis=-1)


def is_constant(values: Float[np.ndarray, '*b n']) -> Bool[np.ndarray, '*b']:
    """Tell whether all values are equal up to rounding, so that no t statistic exists."""
    return np.ptp(values, axis=-1) <= 1e-9 * np.abs(values).max(-1)


def paired_t(
    differences: Float[np.ndarray, '*b n'],
) -> tuple[Float[np.ndarray, '*b'], Float[np.ndarray, '*b']]:
    """The paired t test of "the mean difference is zero", two-sided.

    t = d̄/(s_d/√n), p = 2·P(T_{n−1} ≥ |t|)

    Args:
        differences: Arm minus baseline at each seed, at least two.

    Returns:
        t and p, NaN where the differences are constant.
    """
    undefined = is_constant(differences)[..., None]
    t, p = stats.ttest_1samp(np.where(undefined, np.nan, differences), 0, axis=-1)
    return np.asarray(t), np.asarray(p)


def holm(p_values: Float[np.ndarray, ' m']) -> Float[np.ndarray, ' m']:
    """Holm's p values, corrected for m comparisons: the chance of any false positive stays ≤ α.

    p̃₍ₖ₎ = max_{j ≤ k} min(1, (m − j + 1)·p₍ⱼ₎), p₍₁₎ ≤ … ≤ p₍ₘ₎

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind='stable')
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def contrasts(
    factors: dict[str, list[Any]], levels: list[Levels], reference: Levels
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
        Weights by effect, e.g. `dropout=0.5` and `dropout=0.5 × norm=batch`; multiplied by the
        arms' results of one seed and added up they give the effect at that seed.

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
