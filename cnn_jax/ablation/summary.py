"""The results of an ablation as one plain dict: what is claimed, and all it rests on.

It holds nothing that depends on the machine's speed, so that the same cells give the same file;
times are in `cost`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.ablation import comparison, factorial, statistics, wording
from cnn_jax.ablation.comparison import values
from cnn_jax.ablation.wording import METRICS
from cnn_jax.ablation.workdir import Cell, Results, read_results
from cnn_jax.errors import UserError


def summarize(folder: Path) -> dict[str, Any]:
    """The summary of the ablation in a work directory.

    Errors:
        UserError: The folder holds no ablation, or its metric is unknown.
    """
    return summary_of(read_results(folder))


def summary_of(results: Results) -> dict[str, Any]:
    """The content of `summary.json`; numbers in natural units (accuracy from 0 to 1).

    `decision` says how verdicts are reached, `arms` holds per arm its results, the comparison
    with the baseline and the verdict, `factorial` the effects of a grid (else None).
    """
    ablation = results.ablation
    metric, baseline, seeds = ablation['metric'], ablation['baseline'], ablation['seeds']
    if metric not in METRICS:
        raise UserError(f'the metric of the ablation is {metric!r}; it can be {", ".join(METRICS)}')
    reference = results.of_arm(baseline)
    compared = {
        arm: comparison.compare(reference, results.of_arm(arm), metric)
        for arm in ablation['arms']
        if arm != baseline
    }
    comparisons = comparison.correct(compared)
    arms = {
        arm: {
            **definition,
            **describe(results.of_arm(arm), metric),
            'against_baseline': compared.get(arm),
            'verdict': wording.verdict(arm, baseline, compared[arm], METRICS[metric], len(seeds))
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
            'done': len(results.cells),
            'failed': results.failed,
            'missing': results.missing,
            'unplanned': results.unplanned,
        },
        'decision': _decision(compared, comparisons),
        'arms': arms,
        'baseline_disagreement': comparison.churn(reference),
        'factorial': grid_effects(results),
    }


def describe(cells: dict[int, Cell], metric: str) -> dict[str, Any]:
    """The results of one arm over its finished seeds.

    `gap` is the generalization gap (`comparison.gaps`).
    """
    seeds = list(cells)
    measured = [m for m in METRICS if all(m in c['metrics']['eval'] for c in cells.values())]

    def spreads(split: str) -> dict[str, Any]:
        return {m: spread(values(cells, seeds, split, m), 0, METRICS[m].most) for m in measured}

    return {
        'n': len(seeds),
        'per_seed': {str(s): cells[s]['metrics']['eval'][metric] for s in seeds},
        'eval': spreads('eval'),
        'train': spreads('train'),
        'gap': spread(comparison.gaps(cells, seeds, metric)),
        'examples': next((c['metrics']['eval']['count'] for c in cells.values()), None),
        'parameters': next((c['parameters'] for c in cells.values()), None),
        'steps': next((c['steps'] for c in cells.values()), None),
        'curves': curves(list(cells.values())),
    }


def spread(sample: np.ndarray, least: float = -np.inf, most: float = np.inf) -> dict[str, Any]:
    """Mean, standard deviation and 95% interval; None without enough values, all finite.

    The interval ends where the metric does, at `least` and `most`.
    """
    mean = float(sample.mean()) if len(sample) and np.isfinite(sample).all() else None
    if mean is None or len(sample) < 2:
        return {'mean': mean, 'sd': None, 'interval': None, 'interval_method': None}
    low, high, method = statistics.mean_interval(sample)
    return {
        'mean': mean,
        'sd': float(sample.std(ddof=1)),
        'interval': [max(low, least), min(high, most)],
        'interval_method': method,
    }


def curves(cells: list[Cell]) -> dict[str, list[dict[str, float]]]:
    """Per split and epoch the mean and the range over seeds of loss and accuracy."""
    result: dict[str, list[dict[str, float]]] = {}
    for split in ('train', 'eval'):
        points: dict[float, list[dict[str, Any]]] = {}
        for cell in cells:
            for point in cell['curves']:
                if point['split'] == split:
                    points.setdefault(point['epoch'], []).append(point)
        result[split] = [
            {'epoch': epoch, 'n': len(points[epoch])}
            | {
                f'{name}_{kind}': float(f([p[name] for p in points[epoch]]))
                for name in ('loss', 'accuracy')
                for kind, f in (('mean', np.mean), ('low', np.min), ('high', np.max))
            }
            for epoch in sorted(points)
        ]
    return result


def grid_effects(results: Results) -> dict[str, Any] | None:
    """Main effects and interactions of a factorial grid, over the seeds all its arms finished.

    None without factors; `effects` is None when fewer than two seeds are complete.
    """
    ablation = results.ablation
    if not ablation.get('factors'):
        return None
    arms = {arm: spec['levels'] for arm, spec in ablation['arms'].items() if spec.get('levels')}
    complete = [s for s in ablation['seeds'] if all((arm, s) in results.cells for arm in arms)]
    first = {factor: levels[0] for factor, levels in ablation['factors'].items()}
    reference = arms.get(ablation['baseline'], first)
    answer = {'seeds': complete, 'reference': reference, 'effects': None}
    if len(complete) < 2:
        return answer
    outcomes = np.array(
        [
            [results.cells[arm, s]['metrics']['eval'][ablation['metric']] for arm in arms]
            for s in complete
        ]
    )
    weights = factorial.contrasts(ablation['factors'], list(arms.values()), reference)
    effects = {name: outcomes @ w for name, w in weights.items()}
    rounding = {name: 1e-12 * np.abs(outcomes) @ np.abs(w) for name, w in weights.items()}
    answer['effects'] = {
        name: comparison.inference(np.where(np.abs(effect) < rounding[name], 0, effect))
        for name, effect in effects.items()
    }
    comparison.correct(answer['effects'])
    return answer


def cost(results: Results) -> dict[str, Any]:
    """Seconds and compilations, which are not part of the result.

    A cell records how often its structure had been compiled when it ended; arms of one structure
    share these compilations, so they are not added up.
    """
    arms = {}
    for arm in results.ablation['arms']:
        cells = results.of_arm(arm).values()
        seconds = [cell['seconds'] for cell in cells]
        arms[arm] = {
            'seconds_a_run': float(np.median(seconds)) if seconds else None,
            'seconds': sum(seconds),
            'compilations': max((cell['compilations'] for cell in cells), default=0),
        }
    return {'arms': arms, 'seconds': sum(arm['seconds'] for arm in arms.values())}


def _decision(compared: dict[str, Any], comparisons: int) -> dict[str, Any]:
    pairs = [c['n'] for c in compared.values() if c is not None]
    return {
        'test': 'paired t over seeds, two-sided, Holm-corrected',
        'significance': statistics.SIGNIFICANCE,
        'comparisons': comparisons,
        'pairs': [min(pairs), max(pairs)] if pairs else None,
        'smallest_sign_flip_p': statistics.smallest_sign_flip_p(max(pairs)) if pairs else None,
    }
