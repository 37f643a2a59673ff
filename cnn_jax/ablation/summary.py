"""The summary of an ablation as one plain dict: all that is claimed, and all it rests on.

It holds nothing that depends on the machine's speed, so that the same results give the same file;
times are in `cost`.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax.ablation import statistics
from cnn_jax.ablation.plan import METRICS, Metric, number
from cnn_jax.ablation.results import Result, Results


def summary_of(results: Results) -> dict[str, Any]:
    """The content of `summary.json`; numbers in natural units (accuracy from 0 to 1).

    `decision` says how verdicts are reached, `arms` holds per arm its results, the comparison
    with the baseline and the verdict, `factorial` the effects of a grid (else None).
    """
    ablation = results.definition
    metric, baseline, seeds = ablation['metric'], ablation['baseline'], ablation['seeds']
    reference = results.of_arm(baseline)
    compared = {
        arm: compare(reference, results.of_arm(arm), metric)
        for arm in ablation['arms']
        if arm != baseline
    }
    comparisons = correct(compared)
    pairs = [each['n'] for each in compared.values() if each is not None]
    arms = {
        arm: {
            **definition,
            **describe(results.of_arm(arm), metric),
            'against_baseline': compared.get(arm),
            'verdict': verdict(arm, baseline, compared[arm], METRICS[metric], len(seeds))
            if arm in compared
            else None,
        }
        for arm, definition in ablation['arms'].items()
    }
    return {
        'name': ablation['name'],
        'question': ablation['question'],
        'baseline': baseline,
        'metric': metric,
        'seeds': seeds,
        'cells': {
            'planned': len(ablation['arms']) * len(seeds),
            'done': len(results.done),
            'failed': results.failed,
            'missing': results.missing,
            'unplanned': results.unplanned,
        },
        'decision': {
            'test': 'paired t over seeds, two-sided, Holm-corrected',
            'significance': statistics.SIGNIFICANCE,
            'comparisons': comparisons,
            'pairs': [min(pairs), max(pairs)] if pairs else None,
        },
        'arms': arms,
        'baseline_disagreement': prediction_churn(reference),
        'factorial': factor_effects(results),
    }


def metric_values(runs: dict[int, Result], seeds: list[int], split: str, metric: str) -> np.ndarray:
    """A metric of the given seeds on a split, `train` or `eval`."""
    return np.array([runs[seed]['metrics'][split][metric] for seed in seeds])


def generalization_gaps(runs: dict[int, Result], seeds: list[int], metric: str) -> np.ndarray:
    """The amount by which each network does worse on test than on training images, in inference."""
    train, test = (metric_values(runs, seeds, split, metric) for split in ('train', 'eval'))
    return METRICS[metric].sign * (train - test)


def compare(
    baseline: dict[int, Result], arm: dict[int, Result], metric: str
) -> dict[str, Any] | None:
    """Compare an arm with the baseline over the seeds that both finished; None below two."""
    seeds = [seed for seed in baseline if seed in arm]
    if len(seeds) < 2:
        return None
    of_arm, of_baseline = (metric_values(runs, seeds, 'eval', metric) for runs in (arm, baseline))
    result = infer(of_arm - of_baseline)
    unlike = [np.mean(correct_mask(baseline[seed]) != correct_mask(arm[seed])) for seed in seeds]
    gaps, baseline_gaps = (generalization_gaps(runs, seeds, metric) for runs in (arm, baseline))
    change = gaps - baseline_gaps
    return {
        'seeds': seeds,
        **result,
        'gap_change': float(change.mean()),
        'gap_change_interval': [float(end) for end in statistics.t_interval(change)],
        'disagreement': float(np.mean(unlike)),
    }


def infer(differences: np.ndarray) -> dict[str, Any]:
    """Estimate, interval and tests of paired differences.

    `p` decides: the paired t test's. Where all differences are equal t does not exist, and p is the
    share of the 2ⁿ choices of their signs that give as large a sum.
    """
    n = len(differences)
    constant = bool(statistics.is_constant(differences))
    deviation = 0.0 if constant else float(differences.std(ddof=1))
    t, p_t = map(float, statistics.paired_t(differences))
    p_signs = 2.0 ** (1 - n) if differences.any() else 1.0
    return {
        'n': n,
        'mean': float(differences.mean()),
        'sd': deviation,
        'interval': [float(end) for end in statistics.t_interval(differences)],
        't': _finite(t),
        'p_t': _finite(p_t),
        'p': p_signs if constant else p_t,
    }


def correct(compared: Mapping[str, dict[str, Any] | None]) -> int:
    """Correct the p values of a family in place (Holm); returns the family's size."""
    family = [each for each in compared.values() if each is not None]
    corrected = statistics.holm(np.array([each['p'] for each in family]))
    for each, p in zip(family, corrected):
        each |= {'p_corrected': float(p), 'significant': bool(p < statistics.SIGNIFICANCE)}
    return len(family)


def correct_mask(run: Result) -> np.ndarray:
    """The evaluation examples that a run classified correctly, as booleans in their order."""
    packed = np.frombuffer(bytes.fromhex(run['correct']), np.uint8)
    return np.unpackbits(packed, count=run['metrics']['eval']['count']).astype(bool)


def prediction_churn(runs: dict[int, Result]) -> float | None:
    """The fraction of examples on which two seeds disagree, averaged over all pairs of seeds."""
    rows = [correct_mask(run) for run in runs.values()]
    pairs = [np.mean(a != b) for i, a in enumerate(rows) for b in rows[:i]]
    return float(np.mean(pairs)) if pairs else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def describe(runs: dict[int, Result], metric: str) -> dict[str, Any]:
    """The results of one arm over its finished seeds."""
    seeds, results = list(runs), list(runs.values())
    measured = [m for m in METRICS if all(m in run['metrics']['eval'] for run in results)]

    def spreads(split: str) -> dict[str, Any]:
        return {
            m: spread(metric_values(runs, seeds, split, m), 0, METRICS[m].most) for m in measured
        }

    first = results[0] if results else None
    return {
        'n': len(seeds),
        'per_seed': {str(s): runs[s]['metrics']['eval'][metric] for s in seeds},
        'eval': spreads('eval'),
        'train': spreads('train'),
        'gap': spread(generalization_gaps(runs, seeds, metric)),
        'examples': first['metrics']['eval']['count'] if first else None,
        'parameters': first['parameters'] if first else None,
        'steps': first['steps'] if first else None,
        'curves': curves(results),
    }


def spread(sample: np.ndarray, least: float = -np.inf, most: float = np.inf) -> dict[str, Any]:
    """Mean, standard deviation and 95% interval; None without enough values, all finite.

    The interval ends where the metric does, at `least` and `most`.
    """
    mean = float(sample.mean()) if len(sample) and np.isfinite(sample).all() else None
    if mean is None or len(sample) < 2:
        return {'mean': mean, 'sd': None, 'interval': None}
    low, high = map(float, statistics.t_interval(sample))
    return {
        'mean': mean,
        'sd': float(sample.std(ddof=1)),
        'interval': [max(low, least), min(high, most)],
    }


def curves(runs: list[Result]) -> dict[str, list[dict[str, float]]]:
    """Per split and epoch the mean and the range over seeds of loss and accuracy."""
    reductions = (('mean', np.mean), ('low', np.min), ('high', np.max))
    result: dict[str, list[dict[str, float]]] = {}
    for split in ('train', 'eval'):
        points: dict[float, list[dict[str, Any]]] = {}
        for point in (point for run in runs for point in run['curves'] if point['split'] == split):
            points.setdefault(point['epoch'], []).append(point)
        result[split] = [{'epoch': epoch, 'n': len(points[epoch])} for epoch in sorted(points)]
        for row, name, (kind, f) in itertools.product(
            result[split], ('loss', 'accuracy'), reductions
        ):
            row[f'{name}_{kind}'] = float(f([point[name] for point in points[row['epoch']]]))
    return result


def factor_effects(results: Results) -> dict[str, Any] | None:
    """Main effects and interactions of a factorial grid, over the seeds all its arms finished.

    None without factors; `effects` is None when fewer than two seeds are complete.
    """
    ablation = results.definition
    if not ablation.get('factors'):
        return None
    arms = {arm: spec['levels'] for arm, spec in ablation['arms'].items() if spec.get('levels')}
    complete = [s for s in ablation['seeds'] if all((arm, s) in results.done for arm in arms)]
    first = {factor: levels[0] for factor, levels in ablation['factors'].items()}
    reference = arms.get(ablation['baseline'], first)
    answer = {'seeds': complete, 'reference': reference, 'effects': None}
    if len(complete) < 2:
        return answer
    outcomes = np.array(
        [
            [results.done[arm, s]['metrics']['eval'][ablation['metric']] for arm in arms]
            for s in complete
        ]
    )
    effects = {}
    weights = statistics.contrasts(ablation['factors'], list(arms.values()), reference)
    for name, w in weights.items():
        effect, rounding = outcomes @ w, 1e-12 * np.abs(outcomes) @ np.abs(w)
        effects[name] = infer(np.where(np.abs(effect) < rounding, 0, effect))
    correct(effects)
    return {**answer, 'effects': effects}


def cost(results: Results) -> dict[str, Any]:
    """Seconds of the runs, which are not part of the result."""
    arms = {}
    for arm in results.definition['arms']:
        seconds = [run['seconds'] for run in results.of_arm(arm).values()]
        median = float(np.median(seconds)) if seconds else None
        arms[arm] = {'seconds_a_run': median, 'seconds': sum(seconds)}
    return {'arms': arms, 'seconds': sum(arm['seconds'] for arm in arms.values())}


def decimals(half_width: float, scale: float = 1) -> int:
    """Decimals at which an uncertainty of this half-width shows its first digit, 1 to 4."""
    width = abs(half_width) * scale
    if not (math.isfinite(width) and width > 0):
        return 2
    return min(max(-math.floor(math.log10(width)), 1), 4)


def p_value(p: float | None) -> str:
    """`= 0.012`, `= 0.61`, `< 0.001`; empty where there is none."""
    if p is None:
        return ''
    if p < 0.001:
        return '< 0.001'
    rounded = p + 1e-9  # so that 0.0625 is rounded up
    return f'= {rounded:.3f}' if p < 0.1 else f'= {rounded:.2f}'


def interval(low: float, high: float, metric: Metric) -> str:
    """`0.3 to 1.3`, in the metric's unit."""
    places = decimals((high - low) / 2, metric.scale)
    return f'{number(low * metric.scale, places)} to {number(high * metric.scale, places)}'


def estimate(found: dict[str, Any], metric: Metric, signed: bool = False) -> str:
    """`97.1 (96.8 to 97.4)`, in the metric's unit; without an interval the mean alone."""
    if found['mean'] is None:
        return '–'
    if found['interval'] is None:
        return number(found['mean'] * metric.scale, 2, signed)
    low, high = found['interval']
    places = decimals((high - low) / 2, metric.scale)
    return f'{number(found["mean"] * metric.scale, places, signed)} ({interval(low, high, metric)})'


def verdict(
    arm: str, baseline: str, compared: dict[str, Any] | None, metric: Metric, planned: int
) -> dict[str, str]:
    """The verdict on an arm: `kind` (better | worse | inconclusive | no claim) and `sentence`.

    Args:
        arm, baseline: Their names.
        compared: The entry `against_baseline` of the summary; `None` without two pairs of seeds.
        metric: The metric.
        planned: Seeds of the experiment.
    """
    if compared is None:
        return {
            'kind': 'no claim',
            'sentence': f'{arm}: no claim can be made, since fewer than 2 seeds finished both '
            f'here and in {baseline}; one run says nothing about the next.',
        }
    low, high = compared['interval']
    places = decimals((high - low) / 2, metric.scale)
    n = f'{compared["n"]} of {planned}' if compared['n'] < planned else f'{compared["n"]}'
    start = (
        f'{arm}: {number(compared["mean"] * metric.scale, places, signed=True)} {metric.unit}, '
        f'95% CI {interval(low, high, metric)}, p {p_value(compared["p_corrected"])} corrected, '
        f'n = {n}'
    )
    if compared['significant']:
        kind = 'better' if compared['mean'] * metric.sign > 0 else 'worse'
        return {'kind': kind, 'sentence': f'{start}: {kind} than {baseline}.'}
    limit = (
        '' if compared['sd'] else '; seeds that differ by the same amount say nothing of the next'
    )
    return {'kind': 'inconclusive', 'sentence': f'{start}: not significant{limit}.'}
