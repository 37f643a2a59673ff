"""The figures of an ablation: differences from the controls, tuning, learning curves."""

import functools
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from cnn_jax.ablation.plan import METRICS, Metric
from cnn_jax.ablation.results import read_store, understood
from cnn_jax.ablation.summary import summary_of
from cnn_jax.errors import UserError, printable
from cnn_jax.files import read_text
from cnn_jax.tools.figures import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    RULE,
    STYLE,
    SURFACE,
    WIDTH,
    as_files,
    new_figure,
)

VERDICT_MARKS = {  # colour, marker, colour inside
    **{'better': (BLUE, 'o', BLUE), 'worse': (ORANGE, 'D', ORANGE)},
    **{'equivalent': (GREY, 's', GREY), 'undecided': (GREY, 'o', SURFACE)},
}


def draw(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw the figures that there is something for, as `{name: {'svg': text, 'png': bytes}}`."""
    arms = summary['arms'].values()
    drawings: dict[str, Any] = {}
    if any(arm['control'] for arm in arms):
        drawings['forest'] = draw_forest
    if any(arm['tuned'] for arm in arms):
        drawings['response'] = _draw_response
    for name in ('accuracy', 'loss') if any(arm['curves']['eval'] for arm in arms) else ():
        drawings[f'curves_{name}'] = functools.partial(_draw_curves, metric=METRICS[name])
    return {
        name: as_files(functools.partial(drawing, summary), name)
        for name, drawing in drawings.items()
    }


def draw_forest(summary: dict[str, Any]):
    """Draw each primary measure: means, simultaneous intervals, ticks of replicates, ±δ shaded."""
    arms = [name for name, arm in summary['arms'].items() if arm['control']]
    primaries = summary['primaries']
    figure = new_figure(WIDTH, len(primaries) * (0.85 + 0.42 * len(arms)))
    figure.set_layout_engine('constrained', h_pad=0.1)
    for axes, measure in zip(figure.subplots(len(primaries), squeeze=False).flat, primaries):
        metric = METRICS[measure]
        axes.set_yticks(range(len(arms)), [_wrapped(arm, 18) for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.grid(visible=False, axis='y')
        axes.tick_params(axis='y', length=0)
        axes.spines['left'].set_visible(False)
        axes.locator_params(axis='x', nbins=5)
        axes.set_xlabel(_difference_label(metric))
        _draw_band(axes.axvspan, axes.axvline, summary['margins'][measure], metric)
        for y, arm in enumerate(arms):
            if (compared := summary['arms'][arm]['compared'][measure]) is None:
                axes.text(0, y, ' no claim ', color=MUTED, va='center', ha='left')
                continue
            ticks = [metric.scale * each for each in compared['differences']]
            colour = VERDICT_MARKS[compared['verdict']][0]
            axes.plot(ticks, [y + 0.26] * len(ticks), '|', color=colour, markersize=6, alpha=0.8)
            _draw_estimate(axes, y, compared, metric)
    return figure


def _draw_estimate(axes, at: float, compared: dict[str, Any], metric: Metric, upright=False):
    """Draw a mean and its interval; none where that has no end."""
    colour, marker, face = VERDICT_MARKS[compared['verdict']]
    ends = compared['low'], compared['high']
    mean = metric.scale * compared['mean']
    if all(end is not None and math.isfinite(end) for end in ends):  # None in a `summary.json`
        low, high = (metric.scale * end for end in ends)
        (axes.vlines if upright else axes.hlines)(at, low, high, color=colour, linewidth=2)
    point = (at, mean) if upright else (mean, at)
    axes.plot(*point, marker, color=colour, markerfacecolor=face, markersize=7)


def _draw_band(span: Any, line: Any, margin: float, metric: Metric) -> None:
    """Shade ±δ, across or along, and draw the line of no difference."""
    ends = -margin * metric.scale, margin * metric.scale
    span(*ends, color=RULE, alpha=0.6, linewidth=0, zorder=0)
    line(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))


def _wrapped(name: str, width: int) -> str:
    return '\n'.join(textwrap.wrap(name, width, max_lines=2, placeholder='…'))


def _difference_label(metric: Metric) -> str:
    better = 'higher' if metric.sign > 0 else 'lower'
    return f'difference in {metric.title}\n({metric.unit}, {better} is better)'


def _panels(names: Any, columns: int, size: tuple[float, float], top: float):
    """A figure of a panel of so many inches for each name, and these."""
    count = len(names)
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)
    figure = new_figure(size[0] * columns, top + size[1] * rows)
    grid = [*figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat]
    for axes, name in zip(grid, names):
        axes.set_title(_wrapped(name, 24), loc='left')
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[max(count - columns, 0) : count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def _draw_response(summary: dict[str, Any]):
    """Draw each tuned arm's trials, a row of a panel for each measure; the choice is ringed.

    Trials that failed, or are hardly better than a guess, are crosses at the edge.
    """
    arms = {name: arm['tuned'] for name, arm in summary['arms'].items() if arm['tuned']}
    measures = [*next(iter(arms.values()))['by']]
    figure = new_figure(WIDTH, 0.3 + 1.6 * len(arms))
    grid = figure.subplots(len(arms), len(measures), sharey='col', squeeze=False)
    for row, (name, tuned) in zip(grid, arms.items()):
        for axes, measure in zip(row, measures):
            _draw_trials(axes, tuned, METRICS[measure], summary['chance'][measure])
        row[0].set_title(_wrapped(name, 40), loc='left')
    for axes, measure in zip(grid[0], measures):
        axes.set_title(METRICS[measure].title, loc='right', color=MUTED)
    return figure


def _draw_trials(axes: Any, tuned: dict[str, Any], metric: Metric, guess: float) -> None:
    """Draw a measure of an arm's trials against the first setting that is tuned."""
    path, ends = next(iter(tuned['ranges'].items()))
    choice = tuned['by'][metric.name]
    failed = [v is None or metric.sign * (v - guess) < 0.05 * guess for v in choice['values']]
    x = [point[path] for point in tuned['trials']]
    y = [math.nan if bad else metric.scale * v for bad, v in zip(failed, choice['values'])]
    line = '-' if len(tuned['ranges']) == 1 else ''  # others vary, too
    axes.plot(*zip(*sorted(zip(x, y))), line, color=BLUE, marker='o', markersize=4, linewidth=1)
    edge, bad = (0.05 if metric.sign > 0 else 0.95), [a for a, fails in zip(x, failed) if fails]
    axes.plot(bad, [edge] * len(bad), 'x', color=ORANGE, transform=axes.get_xaxis_transform())
    best = choice['trial']
    axes.plot(x[best], y[best], 'o', color=INK, markerfacecolor='none', markersize=10)
    axes.set_xlabel(_wrapped(path, 30))
    if ends['logarithmic']:
        axes.set_xscale('log')
        _label_powers(axes.xaxis, (1,) if ends['high'] / ends['low'] > 30 else (1, 3))


def _draw_curves(summary: dict[str, Any], metric: Metric):
    """One panel per arm: mean and range over replicates, with its control's evaluation in grey."""
    arms = summary['arms']
    evaluated = 'held-out images' if summary['counts']['validation'] else 'test images'
    figure, grid = _panels([*arms], 2, (WIDTH / 2, 1.45), 0.9)
    for axes, content in zip(grid, arms.values()):
        if content['control']:
            control = arms[content['control']]['curves']['eval']
            axes.plot(*_line(control, metric), ':', color=GREY, label='its control')
        kinds = ('train', ORANGE, '--', 'training'), ('eval', BLUE, '-', evaluated)
        for split, colour, style, label in kinds:
            points = content['curves'][split]
            marker = '.' if len(points) < 12 else ''
            epochs, mean = _line(points, metric)
            low, high = (_line(points, metric, end)[1] for end in ('low', 'high'))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(epochs, mean, style, color=colour, marker=marker, label=label)
    if metric.name == 'loss':
        grid[0].set_yscale('log')
        _label_powers(grid[0].yaxis)
    handles = grid[-1].get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper left', ncols=3, columnspacing=1.2)
    figure.supxlabel('epoch')
    figure.supylabel(f'{metric.title} ({metric.suffix or metric.unit})')
    return figure


def _line(points: list[dict], metric: Metric, kind: str = 'mean'):
    values = [metric.scale * point[f'{metric.name}_{kind}'] for point in points]
    return [point['epoch'] for point in points], values


def _label_powers(axis, subs: tuple[int, ...] = (1, 3)) -> None:
    """Label these multiples of each power of ten as numbers; the default's labels are mathtext."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter('')


def draw_against_n(folders: list[Path], measure: str = 'loss'):
    """Draw the effect of each arm against the number of training images, the other arms in grey.

    Args:
        folders: Work directories of ablations of the same data, or what was kept of them, their
            `summary.json`; each arm once at each number.
        measure: A primary measure of each.

    Errors:
        UserError: A folder holds no ablation, or does not belong into the picture.
    """
    from matplotlib import rc_context

    effects, margin = _effects(folders, measure)
    metric = METRICS[measure]
    sizes = sorted({n for each in effects.values() for n in each})
    with rc_context(STYLE):
        figure, grid = _panels([*effects], 5, (2.4, 2.2), 1.2)
        for axes, points in zip(grid, effects.values()):
            for other in (*effects.values(), points):
                means = [metric.scale * each['mean'] for each in other.values()]
                style = {'color': INK} if other is points else {'color': GREY, 'alpha': 0.4}
                axes.plot([*other], means, **style, linewidth=1)
            for n, compared in points.items():
                _draw_estimate(axes, n, compared, metric, upright=True)
            _draw_band(axes.axhspan, axes.axhline, margin, metric)
        grid[0].set_xscale('log', subs=[])
        grid[0].set_xticks(sizes, [f'{n:,}' for n in sizes])
        for verdict, (colour, marker, face) in VERDICT_MARKS.items():
            grid[0].plot([], [], marker, color=colour, markerfacecolor=face, label=verdict)
        figure.supxlabel('training images (simultaneous 95% intervals; shaded: equivalent)')
        figure.supylabel(_difference_label(metric))
        figure.legend(loc='outside upper left', ncols=4)
    return figure


def _effects(folders: list[Path], measure: str) -> tuple[dict[str, dict[int, Any]], float]:
    """The comparison of each arm with its control by training images, and the margin δ."""
    effects: dict[str, dict[int, Any]] = {}
    common: dict[str, Any] = {}
    for folder in folders:
        with understood(folder):
            _add_effects(folder, measure, effects, common)
    if not effects:
        raise UserError('the ablations compare no arms yet')
    return {arm: dict(sorted(each.items())) for arm, each in effects.items()}, common['margin']


def _add_effects(
    path: Path, measure: str, effects: dict[str, dict[int, Any]], common: dict[str, Any]
) -> None:
    """Add those of one ablation, a work directory or its `summary.json`."""
    summary = json.loads(read_text(path)) if path.is_file() else summary_of(read_store(path))
    if measure not in (found := summary['primaries']):
        raise UserError(f'{path} does not decide on {measure}, but on {", ".join(found)}')
    arms, n = summary['arms'], summary['counts']['train']
    facts = {f'control of {arm}': each['control'] for arm, each in arms.items()}
    facts |= {'data source': summary['source'], 'margin': summary['margins'][measure]}
    for what, fact in facts.items():
        if common.setdefault(what, fact) != fact:
            raise UserError(
                f'{path} has another {what} than an earlier one, {printable(fact)} in the '
                f'place of {printable(common[what])}; draw it apart'
            )
    for arm, content in arms.items():
        if compared := content['compared'].get(measure):
            if n in effects.setdefault(arm, {}):
                raise UserError(f'{path} has {arm} at {n:,} images once more; leave it out')
            effects[arm][n] = compared
