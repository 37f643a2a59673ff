"""The summary of an ablation as one plain dict: all that is claimed, and all it rests on.

It holds nothing that depends on the machine's speed, so that the same results give the same file;
times are in `cost`.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from cnn_jax.ablation import statistics
from cnn_jax.ablation.decisions import OF_IMAGES, decisions, design, due, images_of, values
from cnn_jax.ablation.plan import METRICS, Metric
from cnn_jax.ablation.results import AGAIN, FLOOR, FOLDER, Result, Run, Store, value_of, why_failed
from cnn_jax.tools.page import number

CHECKS = {  # what a regularizer should move, and how it is printed
    'training_loss': ('loss in training', 3),
    'weight_norm': ('norm of the kernels', 1),
    'gradient_norm': ('gradient norm', 3),
    'dropped': ('share dropped', 3),
}


def summary_of(store: Store) -> dict[str, Any]:
    """The content of `summary.json`; numbers in natural units (accuracy from 0 to 1).

    `arms` holds for each arm what its trials chose, its results, and for each primary measure the
    comparison with its control: `mean`, the simultaneous interval `low` to `high`, the adjusted
    `p`, `verdict` and the number of replicates that decided it.
    """
    plan, definition = store.plan, store.definition()
    needed = due(store)
    results = {run: found for run in needed if (found := store.result(run))}
    compared = {measure: _compared(store, measure) for measure in plan.primaries}
    arms = {
        arm: _arm(
            store, results, arm, {m: each[arm] for m, each in compared.items() if arm in each}
        )
        for arm in plan.configs
    }
    counts = definition['counts']
    return {
        'name': plan.name,
        'question': plan.question,
        'baseline': plan.baseline,
        'primaries': list(plan.primaries),
        'margins': plan.margins,
        'looks': list(plan.looks),
        'seeds': list(plan.seeds),
        'comparisons': design(plan).comparisons,
        'significance': statistics.SIGNIFICANCE,
        'trials': {
            'each': plan.trials,
            'widen': plan.widen,
            'finalists': plan.finalists,
            'replicates': len(plan.tuning),
        }
        if any(plan.ranges.values())
        else None,
        'counts': counts,
        'source': plan.configs[plan.baseline].data.source,
        'population': _population(store, counts),
        'runs': {
            'due': len(needed),
            'done': sum(not why_failed(each) for each in results.values()),
            'failed': [
                {**run.label, 'reason': why_failed(each)}
                for run, each in results.items()
                if why_failed(each) and run.kind != FLOOR
            ],
            'missing': [run.label for run in needed if run not in results],
            'other': len({*(store.folder / FOLDER).glob('*.json')} - {run.path for run in needed}),
        },
        'arms': arms,
        'chance': statistics.guess(counts['classes']),
        'floor': _floor(results),
        'repeated': _repeated(store, results),
        'factorial': _factorial(store),
    }


def _population(store: Store, counts: dict[str, int]) -> str:
    """The sentence that says over what the answers generalize."""
    data = store.plan.configs[store.plan.baseline].data
    train, test = f'{counts["train"]:,}', f'{counts["test"]:,}'
    pool = f'{counts["pool"] - counts.get("reserved", counts["validation"]):,}'
    if data.folds:
        return (
            f'A replicate is tested on one of {data.folds} folds, {test} images of '
            f'{counts["pool"]:,}, and trains on the others. Intervals cover new images of the '
            'same source, and allow for what the folds have in common.'
        )
    if not data.subset:
        drawn = f'initial weights and order; all have the same {train} training images'
    else:
        drawn = f'{train} of {pool} training images, initial weights and order'
    alone = [METRICS[m].title for m in store.plan.primaries if m not in OF_IMAGES]
    same = f' (of {" and ".join(alone)}: on these test images)' if alone else ''
    tuned = any(store.plan.ranges.values())
    given = ' They take the values that tuning chose as given.' if tuned else ''
    return (
        f'A replicate draws {drawn}. Intervals cover new replicates and new test images of the '
        f'same source, of which there are {test}{same}.{given}'
    )


def _compared(store: Store, measure: str) -> dict[str, dict[str, Any] | None]:
    """The comparison of each arm with its control; None before its first look."""
    found = decisions(store, measure)
    if found is None:
        return dict.fromkeys(store.plan.against)
    compared = {}
    for m, arm in enumerate(store.plan.against):
        differences = _known(
            values(store, arm, measure) - values(store, store.plan.against[arm], measure)
        )
        compared[arm] = None
        if any(_has_ended(store, each, measure) for each in (arm, store.plan.against[arm])):
            compared[arm] = _comparison(found, m, differences, METRICS[measure].sign)
    return compared


def _has_ended(store: Store, arm: str, measure: str) -> bool:
    """Return whether any replicate of an arm has ended without failing."""
    runs = (store.replicate(arm, number, measure) for number in range(store.plan.looks[-1]))
    results = (store.result(run) for run in runs if run)
    return any(result and not why_failed(result) for result in results)


def _comparison(
    found: statistics.Decisions, m: int, differences: np.ndarray, sign: int
) -> dict[str, Any] | None:
    if not found.replicates[m]:
        return None
    share, low, high = statistics.wins(sign * differences)
    return {
        'n': int(found.replicates[m]),
        'differences': differences[: found.replicates[m]].tolist(),
        'mean': float(found.at.mean[m]),
        'low': float(found.low[m]),
        'high': float(found.high[m]),
        'p': float(found.p[m]),
        'error': float(found.at.error[m]),
        'df': float(found.at.df[m]),
        'verdict': str(found.verdict[m]),
        'decided': int(found.decided[m]),
        'wins': share,
        'wins_interval': [low, high],
    }


def _known(array: np.ndarray) -> np.ndarray:
    return array[np.isfinite(array)]


def _arm(
    store: Store, results: dict[Run, Result], arm: str, compared: dict[str, Any]
) -> dict[str, Any]:
    """The facts about an arm."""
    plan = store.plan
    control = plan.against.get(arm)
    common = set.intersection(*(set(ranges.items()) for ranges in plan.ranges.values()))
    own_ranges = [pair for pair in plan.ranges[arm].items() if pair not in common]
    tuned = {path: f'{each}, tuned' for path, each in own_ranges}
    by_measure = {m: _replicates(store, results, arm, m) for m in METRICS}
    finished = {m: _usable(each) for m, each in by_measure.items()}
    own, usable = by_measure[plan.primaries[0]], finished[plan.primaries[0]]
    first = next(iter(usable.values()), None)
    measured = {
        m: runs
        for m, runs in finished.items()
        if all(value_of(each, 'test', m) is not None for each in runs.values())
    }
    return {
        'changes': {**plan.changes[arm], **tuned},
        'levels': plan.levels.get(arm),
        'control': control,
        'tuned': _tuned(store, arm),
        'n': len(own),
        'failed': {m: len(by_measure[m]) - len(finished[m]) for m in plan.primaries},
        'per_seed': {  # a failed one has None
            m: {str(seed): value_of(each, 'test', m) for seed, each in by_measure[m].items()}
            for m in plan.primaries
        },
        'test': {m: spread(_all(runs, 'test', m), METRICS[m]) for m, runs in measured.items()},
        'train': {m: spread(_all(runs, 'train', m), METRICS[m]) for m, runs in measured.items()},
        'checks': _checks(
            usable, _replicates(store, results, control, plan.primaries[0]) if control else {}
        ),
        'parameters': first['parameters'] if first else None,
        'steps': first['steps'] if first else None,
        'curves': curves(list(usable.values())),
        'compared': compared,
        'verdict': verdict(arm, control, compared, plan.looks[0]) if control else None,
    }


def _replicates(
    store: Store, results: dict[Run, Result], arm: str, measure: str
) -> dict[int, Result]:
    """The results of an arm that a measure is read off, by seed."""
    runs = [store.replicate(arm, number, measure) for number in range(store.plan.looks[-1])]
    return {run.seed: results[run] for run in runs if run in results}


def _usable(results: dict[int, Result]) -> dict[int, Result]:
    return {seed: each for seed, each in results.items() if not why_failed(each)}


def _all(runs: dict[int, Result], split: str, measure: str) -> np.ndarray:
    return np.array([each['metrics'][split][measure] for each in runs.values()])


def _tuned(store: Store, arm: str) -> dict[str, Any] | None:
    """The trials of an arm and what they chose; None of one that is not tuned, or not yet."""
    choices = {judge: store.choice(arm, judge) for judge in store.plan.judges}
    found = {judge: choice for judge, choice in choices.items() if choice and choice.point}
    if not found:
        return None
    return {
        'ranges': {path: dataclasses.asdict(each) for path, each in store.plan.ranges[arm].items()},
        'trials': store.points(arm),
        'by': {judge: dataclasses.asdict(choice) for judge, choice in found.items()},
        'at_edge': sorted({path for choice in found.values() for path in choice.at_edge}),
    }


def _checks(own: dict[int, Result], control: dict[int, Result]) -> dict[str, dict[str, Any]]:
    """The changes of the arm besides its results: means, and ratios to its control's."""
    found = {}
    for name in CHECKS:
        mine = [each['checks'].get(name) for each in own.values()]  # earlier runs have fewer
        pairs = [
            own[seed]['checks'][name] / control[seed]['checks'][name]
            for seed in own
            if seed in control
            and not why_failed(control[seed])
            and control[seed]['checks'].get(name, 0) > 0
        ]
        ratio = float(np.exp(np.mean(np.log(pairs)))) if pairs and min(pairs) > 0 else None
        mean = float(np.mean(mine)) if mine and None not in mine else None
        found[name] = {'mean': mean, 'ratio': ratio}
    return found


def _floor(results: dict[Run, Result]) -> dict[str, Any] | None:
    """The accuracy of the classifier of pixels, or the reason why there is none."""
    runs = [each for run, each in results.items() if run.kind == FLOOR]
    if not runs:
        return None
    if reason := next(filter(None, map(why_failed, runs)), ''):
        return {'reason': reason, 'accuracy': None, 'n': 0}
    sample = np.array([each['metrics']['test']['accuracy'] for each in runs])
    return {'reason': '', 'accuracy': spread(sample, METRICS['accuracy']), 'n': len(runs)}


def _repeated(store: Store, results: dict[Run, Result]) -> bool | None:
    """Whether the baseline's first replicate, trained again, gave the same bits."""
    again = next((each for run, each in results.items() if run.kind == AGAIN), None)
    run = store.replicate(store.plan.baseline, 0, store.plan.judges[0])
    first = run and results.get(run)
    # Runs that are trained together agree to rounding with those that are not.
    if not again or not first or again.get('together') != first.get('together'):
        return None
    return all(again.get(name) == first.get(name) for name in ('metrics', 'correct', 'losses'))


def _factorial(store: Store) -> dict[str, Any] | None:
    """Main effects and interactions of a factorial grid in each primary; None without factors."""
    plan = store.plan
    if not plan.factors:
        return None
    reference = plan.levels[plan.baseline]
    weights = statistics.contrasts(plan.factors, list(plan.levels.values()), reference)
    if not weights:  # no factor has a second level
        return None
    rows = np.array(list(weights.values()))
    rules = design(plan, len(rows) * len(plan.primaries))
    effects: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for measure in plan.primaries if plan.looks[0] > 1 else ():
        outcomes = np.array([values(store, arm, measure) for arm in plan.levels])
        rounding = 1e-12 * np.abs(rows) @ np.abs(outcomes)
        differences = rows @ outcomes
        differences = np.where(np.abs(differences) < rounding, 0, differences)
        known = np.isfinite(outcomes).all(0)
        images = images_of(store, list(plan.levels), measure, known)
        found = statistics.decide(
            differences,
            rules,
            margin=plan.margins[measure],
            sign=METRICS[measure].sign,
            per_image=None if images is None else np.tensordot(rows, images, 1),
        )
        for m, name in enumerate(weights):
            effects[name][measure] = _comparison(
                found, m, _known(differences[m]), METRICS[measure].sign
            )
    return {'reference': reference, 'comparisons': rules.comparisons, 'effects': effects}


def spread(sample: np.ndarray, metric: Metric) -> dict[str, Any]:
    """Mean, standard deviation and Student's 95% interval over replicates, on these test images.

    None without enough values, all finite. The interval ends where the measure does.
    """
    mean = float(sample.mean()) if len(sample) and np.isfinite(sample).all() else None
    if mean is None or len(sample) < 2:
        return {'mean': mean, 'sd': None, 'interval': None}
    low, high = map(float, statistics.t_interval(sample))
    return {
        'mean': mean,
        'sd': float(sample.std(ddof=1)),
        'interval': [max(low, 0.0), min(high, metric.most)],
    }


def curves(runs: list[Result]) -> dict[str, list[dict[str, float]]]:
    """Per split and epoch the mean and the range over replicates of loss and accuracy."""
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


def cost(store: Store) -> dict[str, Any]:
    """Seconds of the runs, which are not part of the result; by arm, trials included."""
    arms = {
        arm: {'trials': 0.0, 'replicates': 0.0, 'seconds_a_run': None} for arm in store.plan.configs
    }
    spent: dict[str, list[float]] = {arm: [] for arm in arms}
    other = 0.0
    for run in due(store):
        if not (result := store.result(run)):
            continue
        seconds = result.get('seconds', result.get('wall_seconds', 0.0))
        if run.kind == 'trial':
            arms[run.arm]['trials'] += seconds
        elif run.kind == 'replicate':
            arms[run.arm]['replicates'] += seconds
            spent[run.arm].append(seconds)
        else:
            other += seconds
    for arm, seconds in spent.items():
        arms[arm]['seconds_a_run'] = float(np.median(seconds)) if seconds else None
    total = other + sum(each['trials'] + each['replicates'] for each in arms.values())
    return {'arms': arms, 'controls': other, 'seconds': total}


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
    """`0.3 to 1.3`, in the measure's unit."""
    if not math.isfinite(high - low):
        return 'unknown'
    places = decimals((high - low) / 2, metric.scale)
    return f'{number(low * metric.scale, places)} to {number(high * metric.scale, places)}'


def estimate(mean: float | None, ends: Any, metric: Metric, signed: bool = False) -> str:
    """`97.1 (96.8 to 97.4)`, in the measure's unit; without an interval the mean alone."""
    if mean is None:
        return '–'
    if ends is None:
        return number(mean * metric.scale, 2, signed)
    low, high = ends
    places = decimals((high - low) / 2, metric.scale)
    return f'{number(mean * metric.scale, places, signed)} ({interval(low, high, metric)})'


def verdict(
    arm: str, control: str, compared: dict[str, dict[str, Any] | None], first_look: int
) -> dict[str, str]:
    """The verdict on an arm: `kind`, over its primary measures, and `sentence`.

    better or worse: in at least one measure, and in none the opposite; mixed: one of each;
    equivalent: in all; else undecided; no claim: before the first look
    """
    known = {m: each for m, each in compared.items() if each is not None}
    if not known:
        least = max(first_look, 2)
        return {'kind': 'no claim', 'sentence': f'{arm}: no claim before {least} replicates end.'}
    kinds = {each['verdict'] for each in known.values()}
    if {'better', 'worse'} <= kinds:
        kind = 'mixed'
    elif decided := kinds & {'better', 'worse'}:
        (kind,) = decided
    else:
        kind = 'equivalent' if kinds == {'equivalent'} else 'undecided'
    parts = [_part(METRICS[measure], each) for measure, each in known.items()]
    most = max(each['n'] for each in known.values())
    return {
        'kind': kind,
        'sentence': f'{arm}: {"; ".join(parts)}; against {control}, {most} replicates.',
    }


def _part(metric: Metric, compared: dict[str, Any]) -> str:
    ends = compared['low'], compared['high']
    difference = estimate(compared['mean'], ends, metric, signed=True)
    value, _, between = difference.partition(' ')
    return f'{metric.title} {compared["verdict"]}, {value} {metric.unit} {between}'.strip()
