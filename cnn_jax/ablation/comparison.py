"""An arm against the baseline: paired over seeds, and example by example."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax.ablation import power, statistics
from cnn_jax.ablation.wording import METRICS
from cnn_jax.ablation.workdir import Cell

EFFECTS = (0.002, 0.005, 0.01, 0.02)  # for which the seeds needed are told, in natural units


def values(cells: dict[int, Cell], seeds: list[int], split: str, metric: str) -> np.ndarray:
    """A metric of the given seeds on a split, `train` or `eval`."""
    return np.array([cells[seed]['metrics'][split][metric] for seed in seeds])


def gaps(cells: dict[int, Cell], seeds: list[int], metric: str) -> np.ndarray:
    """How much worse each network does on unseen images, both splits in inference mode.

    train − test for accuracies, test − train for losses.
    """
    train, test = (values(cells, seeds, split, metric) for split in ('train', 'eval'))
    return METRICS[metric].sign * (train - test)


def compare(baseline: dict[int, Cell], arm: dict[int, Cell], metric: str) -> dict[str, Any] | None:
    """An arm against the baseline over the seeds that both finished; None below two of them."""
    seeds = [seed for seed in baseline if seed in arm]
    if len(seeds) < 2:
        return None
    result = inference(values(arm, seeds, 'eval', metric) - values(baseline, seeds, 'eval', metric))
    per_seed = {
        str(seed): statistics.mcnemar(right(baseline[seed]), right(arm[seed])) for seed in seeds
    }
    gap_change = gaps(arm, seeds, metric) - gaps(baseline, seeds, metric)
    return {
        'seeds': seeds,
        **result,
        'seeds_needed': {
            str(effect): power.seeds_needed(effect / result['sd']) if result['sd'] else None
            for effect in EFFECTS
        },
        'gap_change': float(gap_change.mean()),
        'gap_change_interval': [float(end) for end in statistics.t_interval(gap_change)],
        'mcnemar': per_seed,
        'disagreement': float(np.mean([m['disagreement'] for m in per_seed.values()])),
        'only_baseline': sum(m['only_baseline'] for m in per_seed.values()),
        'only_arm': sum(m['only_arm'] for m in per_seed.values()),
    }


def inference(differences: np.ndarray) -> dict[str, Any]:
    """What paired differences say: estimate, interval, tests, effect size, detectable effect.

    `p` decides: the paired t test's, or the sign-flip test's where all differences are equal and
    t does not exist.
    """
    n = len(differences)
    deviation = float(differences.std(ddof=1))
    if statistics.constant(differences):
        deviation = 0.0
    t, p_t = map(float, statistics.paired_t(differences))
    d, g = map(float, statistics.effect_size(differences))
    p_flip = float(statistics.sign_flip_test(differences))
    return {
        'n': n,
        'mean': float(differences.mean()),
        'sd': deviation,
        'interval': [float(end) for end in statistics.t_interval(differences)],
        't': _finite(t),
        'p_t': _finite(p_t),
        'p_sign_flip': p_flip,
        'p': p_flip if np.isnan(p_t) else p_t,
        'effect_size': _finite(d),
        'hedges_g': _finite(g),
        'detectable': power.detectable_effect(n) * deviation,
    }


def correct(compared: Mapping[str, dict[str, Any] | None]) -> int:
    """Correct the p values of a family in place (Holm); returns the family's size."""
    family = [c for c in compared.values() if c is not None]
    for name in ('p', 'p_sign_flip'):
        corrected = statistics.holm(np.array([c[name] for c in family]))
        for one, p in zip(family, corrected):
            one[f'{name}_corrected'] = float(p)
    for one in family:
        level = statistics.SIGNIFICANCE / len(family)
        one['significant'] = one['p_corrected'] < statistics.SIGNIFICANCE
        one['detectable_corrected'] = power.detectable_effect(one['n'], level) * one['sd']
    return len(family)


def right(cell: Cell) -> np.ndarray:
    """Which evaluation examples a cell classified correctly, in order."""
    packed = np.frombuffer(bytes.fromhex(cell['correct']), np.uint8)
    return np.unpackbits(packed, count=cell['metrics']['eval']['count']).astype(bool)


def churn(cells: dict[int, Cell]) -> float | None:
    """Share of examples on which two seeds of the baseline disagree, over all pairs of seeds."""
    rows = [right(cell) for cell in cells.values()]
    pairs = [np.mean(a != b) for i, a in enumerate(rows) for b in rows[:i]]
    return float(np.mean(pairs)) if pairs else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
