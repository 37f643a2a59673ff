"""The figures of an ablation: paired differences, learning curves, gap.

They are drawn 360 points wide, so that their text is readable on a phone, with colours that
differ in lightness as well as in hue.
"""

import functools
import io
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
    'font.size': 10,
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
VERDICT_MARKS = {  # kind: colour, marker, colour inside
    'better': (BLUE, 'o', BLUE),
    'worse': (ORANGE, 'D', ORANGE),
    'inconclusive': (GREY, 'o', SURFACE),
}
WIDTH = 5.0  # inches, at 72 points each
LABELS, COLUMN, ROW = 1.7, 2.4, 0.3  # inches, of a figure of several ablations


def draw(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw every figure as `{name: {'svg': text, 'png': bytes}}`; one summary gives one SVG."""
    from matplotlib import rc_context

    drawings = {
        'forest': draw_forest,
        'curves_accuracy': functools.partial(_draw_curves, metric=METRICS['accuracy']),
        'curves_loss': functools.partial(_draw_curves, metric=METRICS['loss']),
        'gap': _draw_gap,
    }
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
    """Draw the paired differences from the baseline: each seed's, their mean, its 95% interval."""
    arms = _compared_arms(summary)
    figure, axes = _row_figure(arms, height=0.5)
    _draw_differences(axes, summary, arms)
    figure.supxlabel(_difference_label(summary), fontsize=10)
    return figure


def draw_side_by_side(folders: list[Path]):
    """Draw the paired differences of several ablations from their baselines as one figure.

    Ablations of one name are one block of rows, those on the same training images one column.

    Errors:
        UserError: A folder holds no ablation, two belong in one place, or metrics differ.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    blocks = _blocks(folders)
    summaries = [summary for block in blocks.values() for summary in block.values()]
    columns = list(dict.fromkeys(data for block in blocks.values() for data in block))
    rows = {
        name: list(dict.fromkeys(arm for each in block.values() for arm in _compared_arms(each)))
        for name, block in blocks.items()
    }
    heights = [len(arms) + 1 for arms in rows.values()]
    with rc_context(STYLE | {'font.size': 9}):
        size = LABELS + COLUMN * len(columns), 0.8 + ROW * sum(heights)
        figure = Figure(figsize=size, layout='constrained')
        grid = figure.subplots(
            len(blocks), len(columns), squeeze=False, sharex=True, height_ratios=heights
        )
        for line, (name, block) in zip(grid, blocks.items()):
            for axes, data in zip(line, columns):
                _label_rows(axes, rows[name])
                axes.tick_params(labelleft=axes is line[0])
                if data in block:
                    _draw_differences(axes, block[data], rows[name])
            line[0].set_title(name, loc='left', fontweight='bold', x=0, ha='right')
        for axes, data in zip(grid[0], columns):
            axes.set_title(data)
        legend = 'blue: better, orange: worse, grey: not significant (95% intervals; Holm)'
        figure.supxlabel(f'{_difference_label(summaries[0])}\n{legend}', fontsize=9)
    return figure


def _blocks(folders: list[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """The summary of each ablation, `{name: {data: summary}}`."""
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    metrics: dict[str, Path] = {}
    for folder in folders:
        with understood(folder):
            results = read_results(folder)
            summary, definition = summary_of(results), results.definition
            config = definition['configs'][definition['baseline']]
            source = Path(config['data.source'].partition(':')[2] or config['data.source']).name
            data = printable(f'{source} {config["data.train"]}')
        name = printable(definition['name'])
        block = blocks.setdefault(name, {})
        if data in block:
            raise UserError(f'{folder} is a second ablation {name} on {data}; give one of them')
        block[data] = summary
        metrics.setdefault(definition['metric'], folder)
    if len(metrics) > 1:
        differing = ', '.join(f'{metric} in {folder}' for metric, folder in metrics.items())
        raise UserError(f'the metrics differ: {differing}; give ablations of one metric')
    return blocks


def _row_figure(arms: list[str], height: float = 0.42) -> tuple[Any, Any]:
    """A figure and its axes with one row per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.0 + height * len(arms)), layout='constrained')
    axes = figure.subplots()
    _label_rows(axes, arms)
    return figure, axes


def _label_rows(axes, arms: list[str]) -> None:
    """Make the vertical axis one row per arm, the first on top."""
    labels = ['\n'.join(textwrap.wrap(_shorten(arm, 36), 20)) for arm in arms]
    axes.set_yticks(range(len(arms)), labels)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(visible=False, axis='y')
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.locator_params(axis='x', nbins=6)


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + '…'


def _compared_arms(summary: dict[str, Any]) -> list[str]:
    return [name for name in summary['arms'] if name != summary['baseline']]


def _difference_label(summary: dict[str, Any]) -> str:
    metric = METRICS[summary['metric']]
    better = 'higher' if metric.sign > 0 else 'lower'
    return f'difference in {metric.title} ({metric.unit}, {better} is better)'


def _draw_differences(axes, summary: dict[str, Any], arms: list[str]) -> None:
    """Draw a row for each arm: its paired differences from the baseline, their mean and interval.

    A row whose arm the summary does not have stays empty.
    """
    scale = METRICS[summary['metric']].scale
    reference = summary['arms'][summary['baseline']]['per_seed']
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for y, name in enumerate(arms):
        if name not in summary['arms']:
            continue
        arm = summary['arms'][name]
        compared = arm['against_baseline']
        if compared is None:
            axes.text(0, y, ' no claim ', color=MUTED, va='center', ha='left')
            continue
        colour, marker, face = VERDICT_MARKS[arm['verdict']['kind']]
        seeds = [scale * (arm['per_seed'][s] - reference[s]) for s in map(str, compared['seeds'])]
        axes.plot(seeds, [y + 0.24] * len(seeds), '|', color=colour, markersize=6, alpha=0.8)
        _draw_interval(axes, y, compared['interval'], scale, colour)
        axes.plot(scale * compared['mean'], y, marker, color=colour, markerfacecolor=face, ms=7)


def _draw_interval(axes, y: int, interval: list[float], scale: float, colour: str) -> None:
    ends = [scale * end for end in interval]
    axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle='butt')


def _draw_curves(summary: dict[str, Any], metric: Metric):
    """One panel per arm: mean and range over seeds, with the baseline's evaluation in grey."""
    from matplotlib.figure import Figure

    arms = summary['arms']
    columns = min(2, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.45 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (arm, content) in zip(grid.flat, arms.items()):
        axes.set_title(_shorten(arm, 24), fontsize=10, loc='left')
        if arm != summary['baseline']:
            baseline = arms[summary['baseline']]['curves']['eval']
            axes.plot(*_line(baseline, metric), ':', color=GREY, label='baseline, test')
        for split, colour, style, label in (
            ('train', ORANGE, '--', 'training'),
            ('eval', BLUE, '-', 'test'),
        ):
            points = content['curves'][split]
            marker = '.' if len(points) < 12 else ''
            epochs, mean = _line(points, metric)
            low, high = (_line(points, metric, end)[1] for end in ('low', 'high'))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(epochs, mean, style, color=colour, marker=marker, label=label)
    if metric.name == 'loss' and any(arm['n'] for arm in arms.values()):
        _set_log_scale(grid[0, 0])
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(len(arms) - columns, 0) : len(arms)]:
        axes.tick_params(labelbottom=True)
    labelled = [each for axes in grid.flat for each in zip(*axes.get_legend_handles_labels())]
    handles = {label: handle for handle, label in labelled}
    figure.legend(handles.values(), handles, loc='outside upper left', ncols=3, fontsize=9)
    figure.supxlabel('epoch', fontsize=10)
    figure.supylabel(f'{metric.title} ({metric.suffix or metric.unit})', fontsize=10)
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


def _draw_gap(summary: dict[str, Any]):
    """Training and evaluation results of the trained networks, joined: the gap is the length."""
    metric = METRICS[summary['metric']]
    figure, axes = _row_figure(list(summary['arms']))
    marks = (
        ('train', 'training', {'marker': 's', 'color': ORANGE, 'markerfacecolor': SURFACE}),
        ('eval', 'test', {'marker': 'o', 'color': BLUE}),
    )
    for _, label, mark in marks:
        axes.plot([], [], linestyle='', label=label, markersize=7, **mark)
    for y, arm in enumerate(summary['arms'].values()):
        ends = [arm[split].get(metric.name, {}).get('mean') for split, _, _ in marks]
        if None in ends:
            _write_no_result(axes, y)
            continue
        _draw_interval(axes, y, ends, metric.scale, GREY)
        for end, (_, _, mark) in zip(ends, marks):
            axes.plot(end * metric.scale, y, markersize=7, **mark)
    figure.supxlabel(f'{metric.title} ({metric.suffix or metric.unit})', fontsize=10)
    figure.legend(loc='outside upper left', ncols=2, fontsize=9)
    return figure


def _write_no_result(axes, y: int) -> None:
    across = axes.get_yaxis_transform()  # x is a fraction of the width
    axes.text(0.5, y, 'no result', color=MUTED, va='center', transform=across)
