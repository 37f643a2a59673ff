"""The figures of an ablation: differences from the controls, tuning, learning curves.

They are drawn 360 points wide, so that their text is readable on a phone, with colours that
differ in lightness as well as in hue.
"""

import functools
import io
import itertools
import math
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from cnn_jax.ablation.plan import METRICS, Metric
from cnn_jax.ablation.results import read_store, understood
from cnn_jax.ablation.summary import summary_of
from cnn_jax.errors import UserError, printable
from cnn_jax.tools.figures import save

# Colours of the light theme by the CSS variables that replace them in the page.
COLOURS = {
    **{'ink': '#1b1f24', 'muted': '#57606b', 'rule': '#d1d7de', 'surface': '#fefefe'},
    **{'blue': '#0069a8', 'orange': '#b34a00', 'grey': '#6b7480'},
}
INK, MUTED, RULE, SURFACE, BLUE, ORANGE, GREY = COLOURS.values()
STYLE: Any = {
    'svg.fonttype': 'none',
    'text.parse_math': False,  # an arm's name is text, whatever it holds
    'font.size': 10,  # at 390 px the page shows 360 points as 337 px: smaller is not legible
    **dict.fromkeys(('axes.titlesize', 'figure.labelsize'), 10),
    'font.family': 'sans-serif',
    'lines.linewidth': 1.6,
    'grid.linewidth': 0.6,
    'grid.color': RULE,
    'axes.facecolor': 'none',
    **dict.fromkeys(('figure.facecolor', 'savefig.facecolor'), SURFACE),
    **dict.fromkeys(('axes.edgecolor', 'xtick.color', 'ytick.color'), MUTED),
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'xtick.labelcolor', 'ytick.labelcolor'), INK),
    **dict.fromkeys(('axes.spines.top', 'axes.spines.right', 'legend.frameon'), False),
    **dict.fromkeys(('axes.grid', 'axes.axisbelow'), True),
}
VERDICT_MARKS = {  # colour, marker, colour inside
    'better': (BLUE, 'o', BLUE),
    'worse': (ORANGE, 'D', ORANGE),
    'equivalent': (GREY, 's', GREY),
    'undecided': (GREY, 'o', SURFACE),
}
WIDTH = 5.0  # inches, at 72 points each


def draw(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw the figures that there is something for, as `{name: {'svg': text, 'png': bytes}}`.

    One summary gives one SVG.
    """
    from matplotlib import rc_context

    arms = summary['arms'].values()
    drawings: dict[str, Any] = {}
    if any(arm['control'] for arm in arms):
        drawings['forest'] = draw_forest
    if any(arm['tuned'] for arm in arms):
        drawings['response'] = _draw_response
    if any(arm['curves']['eval'] for arm in arms):
        for name in ('accuracy', 'loss'):
            drawings[f'curves_{name}'] = functools.partial(_draw_curves, metric=METRICS[name])
    result = {}
    for name, drawing in drawings.items():
        with rc_context(STYLE | {'svg.hashsalt': name}):  # the salt makes ids reproducible
            figure = drawing(summary)
            svg, png = io.BytesIO(), io.BytesIO()
            save(figure, svg, format='svg', metadata={'Date': None, 'Creator': None})
            save(figure, png, dpi=200, metadata={'Software': None})
        result[name] = {'svg': svg.getvalue().decode(), 'png': png.getvalue()}
    return result


def themed(svg: str, label: str) -> str:
    """Return a figure as an element of the page: in the page's colours, with a spoken label."""
    ET.register_namespace('', 'http://www.w3.org/2000/svg')
    ET.register_namespace('xlink', 'http://www.w3.org/1999/xlink')
    root = ET.fromstring(svg)
    for metadata in root.findall('{*}metadata'):
        root.remove(metadata)
    del root.attrib['width'], root.attrib['height']
    root.attrib |= {'role': 'img', 'aria-label': label}
    text = ET.tostring(root, encoding='unicode')
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f'var(--{variable})')
    return text


def draw_forest(summary: dict[str, Any]):
    """Draw a panel for each primary measure: each arm's difference from its control.

    The mean, the simultaneous interval, below it a tick for each replicate; shaded the band in
    which a difference is none.
    """
    from matplotlib.figure import Figure

    arms = [name for name, arm in summary['arms'].items() if arm['control']]
    primaries = summary['primaries']
    figure = Figure(figsize=(WIDTH, len(primaries) * (0.85 + 0.42 * len(arms))))
    figure.set_layout_engine('constrained', h_pad=0.1)
    for axes, measure in zip(figure.subplots(len(primaries), squeeze=False).flat, primaries):
        metric = METRICS[measure]
        axes.set_yticks(range(len(arms)), [_wrapped(arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.grid(visible=False, axis='y')
        axes.tick_params(axis='y', length=0)
        axes.spines['left'].set_visible(False)
        axes.locator_params(axis='x', nbins=5)
        axes.set_xlabel(_difference_label(metric))
        _draw_band(axes.axvspan, axes.axvline, summary['margins'][measure], metric)
        for y, arm in enumerate(arms):
            _draw_difference(axes, y, summary, arm, metric)
    return figure


def _draw_difference(axes, y: int, summary: dict[str, Any], arm: str, metric: Metric) -> None:
    compared = summary['arms'][arm]['compared'].get(metric.name)
    if compared is None:
        axes.text(0, y, ' no claim ', color=MUTED, va='center', ha='left')
        return
    pair = [summary['arms'][each] for each in (arm, summary['arms'][arm]['control'])]
    own, control = (each['per_seed'][metric.name] for each in pair)
    failed = summary['chance'][metric.name]  # what a failed replicate is worth
    differences = [
        (failed if own[seed] is None else own[seed])
        - (failed if control[seed] is None else control[seed])
        for seed in map(str, summary['seeds'][: compared['n']])
    ]
    scaled = [metric.scale * each for each in differences]
    colour = VERDICT_MARKS[compared['verdict']][0]
    axes.plot(scaled, [y + 0.26] * len(scaled), '|', color=colour, markersize=6, alpha=0.8)
    _draw_estimate(axes, y, compared, metric)


def _draw_estimate(axes, at: float, compared: dict[str, Any], metric: Metric, upright=False):
    """Draw a mean and its interval, of which none is drawn where it has no end."""
    colour, marker, face = VERDICT_MARKS[compared['verdict']]
    low, mean, high = (metric.scale * compared[each] for each in ('low', 'mean', 'high'))
    ends = [low, high] if math.isfinite(high - low) else []
    for values, style in (
        (ends, {'linewidth': 2, 'solid_capstyle': 'butt'}),
        ([mean], {'marker': marker, 'mfc': face, 'markersize': 7, 'label': compared['verdict']}),
    ):
        places = [at] * len(values)
        points = (places, values) if upright else (values, places)
        axes.plot(*points, color=colour, linestyle='-' if values is ends else '', **style)


def _draw_band(span: Any, line: Any, margin: float, metric: Metric) -> None:
    """Shade ±δ, across or along, and draw the line of no difference."""
    ends = -margin * metric.scale, margin * metric.scale
    span(*ends, color=RULE, alpha=0.6, linewidth=0, zorder=0)
    line(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))


def _wrapped(name: str, width: int = 18, most: int = 36) -> str:
    return '\n'.join(textwrap.wrap(_shorten(name, most), width))


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + '…'


def _difference_label(metric: Metric) -> str:
    better = 'higher' if metric.sign > 0 else 'lower'
    return f'difference in {metric.title}\n({metric.unit}, {better} is better)'


def _panels(names: Any, columns: int, size: tuple[float, float], top: float) -> tuple[Any, Any]:
    """A figure of a panel for each name with common axes, and these; the rest stays empty.

    Args:
        names: Headings.
        columns: The most panels in a row.
        size: Inches of a panel.
        top: Inches for legend and axes.
    """
    from matplotlib.figure import Figure

    count = len(names)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figsize = size[0] * columns, top + size[1] * rows
    figure = Figure(figsize=figsize, layout='constrained')
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(grid, names):
        axes.set_title(_wrapped(name, 24, 48), loc='left')
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[max(count - columns, 0) : count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def _draw_legend(figure, axes: list[Any], columns: int) -> None:
    labelled = itertools.chain(*(zip(*each.get_legend_handles_labels()) for each in axes))
    handles = {label: handle for handle, label in labelled}
    figure.legend(
        handles.values(), handles, loc='outside upper left', ncols=columns, columnspacing=1.2
    )


def _draw_response(summary: dict[str, Any]):
    """Draw a panel for each tuned arm: the validation loss of its trials; the choice is marked.

    Trials that failed, or are worse than a guess, are crosses at the top.
    """
    arms = {name: arm['tuned'] for name, arm in summary['arms'].items() if arm['tuned']}
    figure, grid = _panels([*arms], 2, (WIDTH / 2, 1.6), 0.5)
    guess = summary['chance']['loss']
    for axes, tuned in zip(grid, arms.values()):
        path, ends = next(iter(tuned['ranges'].items()))
        trials = [(each['point'][path], each['loss']) for each in tuned['trials']]
        good = sorted((x, loss) for x, loss in trials if loss is not None and loss <= guess)
        bad = [x for x, loss in trials if loss is None or loss > guess]
        join = '-' if len(tuned['ranges']) == 1 else ''  # others vary, too
        axes.plot(*zip(*good), join, color=BLUE, marker='o', markersize=4, linewidth=1)
        axes.plot(bad, [0.95] * len(bad), 'x', color=ORANGE, transform=axes.get_xaxis_transform())
        chosen = tuned['trials'][tuned['trial']]
        axes.plot(chosen['point'][path], chosen['loss'], 'o', color=INK, mfc='none', markersize=10)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(_shorten(path, 30))
        _set_range(axes, ends['low'], ends['high'], ends['logarithmic'])
    figure.supylabel('validation loss (nats)')
    return figure


def _set_range(axes, low: float, high: float, logarithmic: bool) -> None:
    """Label a horizontal axis at the powers of ten, or at three places."""
    ticks = [low, (low + high) / 2, high]
    if logarithmic:
        axes.set_xscale('log')
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        step = math.ceil(len(powers) / 4)
        ticks = [10.0**power for power in powers[::step]] if len(powers) > 1 else [low, high]
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.set_xticks([], minor=True)


def _draw_curves(summary: dict[str, Any], metric: Metric):
    """One panel per arm: mean and range over replicates, with its control's evaluation in grey."""
    arms = summary['arms']
    evaluated = 'held-out images' if summary['counts']['validation'] else 'test images'
    figure, grid = _panels([*arms], 2, (WIDTH / 2, 1.45), 0.9)
    for axes, content in zip(grid, arms.values()):
        if content['control']:
            control = arms[content['control']]['curves']['eval']
            axes.plot(*_line(control, metric), ':', color=GREY, label='its control')
        for split, colour, style, label in (
            ('train', ORANGE, '--', 'training'),
            ('eval', BLUE, '-', evaluated),
        ):
            points = content['curves'][split]
            marker = '.' if len(points) < 12 else ''
            epochs, mean = _line(points, metric)
            low, high = (_line(points, metric, end)[1] for end in ('low', 'high'))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(epochs, mean, style, color=colour, marker=marker, label=label)
    if metric.name == 'loss':
        _set_log_scale(grid[0])
    _draw_legend(figure, grid, 3)
    figure.supxlabel('epoch')
    figure.supylabel(f'{metric.title} ({metric.suffix or metric.unit})')
    return figure


def _line(points: list[dict], metric: Metric, kind: str = 'mean'):
    values = [metric.scale * point[f'{metric.name}_{kind}'] for point in points]
    return [point['epoch'] for point in points], values


def _set_log_scale(axes) -> None:
    """Label 1 and 3 of each power of ten as plain numbers; the default's labels are mathtext."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_against_n(folders: list[Path], measure: str = 'loss'):
    """Draw the effect of each arm against the number of training images, a panel for each arm.

    Its difference from its control with simultaneous intervals, filled where decided; the other
    arms in grey.

    Args:
        folders: Work directories of ablations of the same data; each arm once at each number.
        measure: A primary measure of each.

    Errors:
        UserError: A folder holds no ablation, or does not belong into the picture.
    """
    from matplotlib import rc_context

    effects, margins = _effects(folders, measure)
    metric = METRICS[measure]
    sizes = sorted({n for each in effects.values() for n in each})
    with rc_context(STYLE):
        figure, grid = _panels([*effects], 5, (2.4, 2.2), 1.2)
        for axes, points in zip(grid, effects.values()):
            for other in (*effects.values(), points):
                means = [metric.scale * each['mean'] for each in other.values()]
                axes.plot([*other], means, color=INK if other is points else RULE, linewidth=1.2)
            for n, compared in points.items():
                _draw_estimate(axes, n, compared, metric, upright=True)
            if len(margins) == 1:
                _draw_band(axes.axhspan, axes.axhline, *margins, metric)
        grid[0].set_xscale('log')
        grid[0].set_xticks(sizes, [f'{n:,}' for n in sizes])
        grid[0].set_xticks([], minor=True)
        figure.supxlabel('training images')
        figure.supylabel(_difference_label(metric), ha='center')
        _draw_legend(figure, grid, 4)
    return figure


def _effects(folders: list[Path], measure: str) -> tuple[dict[str, dict[int, Any]], set[float]]:
    """The comparison of each arm with its control by training images, and the margins δ."""
    effects: dict[str, dict[int, Any]] = {}
    sources, controls, margins = {}, {}, set()
    for folder in folders:
        with understood(folder):
            store = read_store(folder)
            summary = summary_of(store)
            source = store.plan.configs[store.plan.baseline].data.source
        if measure not in summary['primaries']:
            raise UserError(
                f'{folder} does not decide on {measure!r}; its measures are '
                f'{", ".join(summary["primaries"])}'
            )
        sources.setdefault(source, folder)
        if len(sources) > 1:
            one, other = map(printable, sources)
            raise UserError(f'{folder} is of other data ({other}) than {folders[0]} ({one})')
        margins.add(summary['margins'][measure])
        n = summary['counts']['train']
        for arm, content in summary['arms'].items():
            if not (compared := content['compared'].get(measure)):
                continue
            if controls.setdefault(arm, content['control']) != content['control']:
                raise UserError(f'{folder} compares {arm} with another control than {folders[0]}')
            if n in effects.setdefault(arm, {}):
                raise UserError(f'{folder} has {arm} at {n:,} images a second time')
            effects[arm][n] = compared
    if not effects:
        raise UserError('the ablations compare no arms yet')
    return {arm: dict(sorted(each.items())) for arm, each in effects.items()}, margins
