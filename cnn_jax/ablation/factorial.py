"""Main effects and interactions of a factorial grid, as contrasts within each seed."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

Levels = dict[str, Any]


def contrasts(
    factors: dict[str, list[Any]], levels: list[Levels], reference: Levels
) -> dict[str, Float[np.ndarray, ' a']]:
    """The weights over arms of every main effect and two-factor interaction.

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
    others = {f: [x for x in factors[f] if x != reference[f]] for f in factors}

    def difference(factor: str, level: Any) -> np.ndarray:
        return np.array(
            [(arm[factor] == level) * 1.0 - (arm[factor] == reference[factor]) for arm in levels]
        )

    def name(factor: str, level: Any) -> str:
        return f'{factor}={level}'

    found = {}
    for factor in factors:
        for level in others[factor]:
            weights = difference(factor, level)
            found[name(factor, level)] = weights / (weights > 0).sum()
    for a, b in itertools.combinations(factors, 2):
        for x, y in itertools.product(others[a], others[b]):
            weights = difference(a, x) * difference(b, y)
            both = sum(arm[a] == x and arm[b] == y for arm in levels)
            found[f'{name(a, x)} × {name(b, y)}'] = weights / both
    return found
