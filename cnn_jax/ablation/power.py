"""How much a number of seeds can tell: power of the paired t test."""

from scipy import optimize, special, stats

from cnn_jax.ablation.statistics import SIGNIFICANCE

POWER = 0.8
MOST_SEEDS = 100_000


def power(effect: float, n: float, significance: float = SIGNIFICANCE) -> float:
    """The chance that a two-sided paired t test over n seeds finds an effect.

    P(|T| ≥ t(1 − α/2; n−1)), T noncentral t with n − 1 degrees of freedom and δ = d·√n

    Args:
        effect: Standardized, d = mean difference / standard deviation of the differences.
        n: Seeds, at least 2.
        significance: α.

    Source: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences", chapter 2.
    """
    critical = stats.t.ppf(1 - significance / 2, n - 1)
    # T² is noncentral F(1, n−1; δ²), whose distribution SciPy computes for any δ.
    return float(1 - special.ncfdtr(1, n - 1, n * effect**2, critical**2))


def detectable_effect(n: int, significance: float = SIGNIFICANCE, wanted: float = POWER) -> float:
    """The smallest standardized effect that n seeds find with the wanted power.

    Multiply by the standard deviation of the differences for the effect in the metric's unit.
    """
    high = 1.0
    while power(high, n, significance) < wanted:
        high *= 2
    found = optimize.root_scalar(
        lambda d: power(d, n, significance) - wanted, bracket=(0.0, high), method='brentq'
    )
    return float(found.root)


def seeds_needed(
    effect: float, significance: float = SIGNIFICANCE, wanted: float = POWER
) -> int | None:
    """The fewest seeds that find a standardized effect with the wanted power.

    Returns:
        At least 2; `None` for more than `MOST_SEEDS`.
    """
    if power(effect, MOST_SEEDS, significance) < wanted:
        return None
    low, high = 1, MOST_SEEDS  # `low` is too few, `high` enough: power grows with the seeds
    while high - low > 1:
        middle = (low + high) // 2
        if power(effect, middle, significance) < wanted:
            low = middle
        else:
            high = middle
    return high
