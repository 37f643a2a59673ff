"""The figures of an ablation: paired differences, learning curves, gap, calibration.

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
from cnn_jax.ablation.results import Results, read_results
from cnn_jax.ablation.summary import summary_of
from cnn_jax.errors import UserError

# Colours of the light theme, and the CSS variables that replace them in the page.
INK, MUTED, RULE, SURFACE = '#1b1f24', '#57606b', '#d1d7de', '#fefefe'
BLUE, ORANGE, GREY = '#0069a8', '#b34a00', '#6b7480'
VARIABLES = {
    INK: '--ink',
    MUTED: '--muted',
    RULE: '--rule',
    SURFACE: '--surface',
    BLUE: '--blue',
    ORANGE: '--orange',
    GREY: '--grey',
}
STYLE: Any = {
    'svg.fonttype': 'none',
    'text.parse_math': False,  # an arm's name is text, whatever it holds
    'font.size': 10,
    'font.family': 'sans-serif',
    'figure.facecolor': SURFACE,
    'savefig.facecolor': SURFACE,
    'axes.facecolor': 'none',
    'axes.edgecolor': MUTED,
    'axes.labelcolor': INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': RULE,
    'grid.linewidth': 0.6,
    'text.color': INK,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'xtick.labelcolor': INK,
    'ytick.labelcolor': INK,
    'legend.frameon': False,
    'lines.linewidth': 1.6,
}
VERDICT_MARKS = {  # kind: colour, marker, filled
    'better': (BLUE, 'o', True),
    'worse': (ORANGE, 'D', True),
    'inconclusive': (GREY, 'o', False),
}
WIDTH = 5.0  # inches, at 72 points each
LABELS, COLUMN, ROW = 1.7, 2.4, 0.3  # inches, of a figure of several ablations


def draw(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure as `{name: {'svg': text, 'png': bytes}}`; the same summary, the same SVG."""
    from matplotlib import rc_context

    drawings = {
        'forest': draw_forest,
        'curves_accuracy': functools.partial(_draw_curves, name='accuracy'),
        'curves_loss': functools.partial(_draw_curves, name='loss'),
        'gap': _draw_gap,
        'calibration': _draw_calibration,
    }
    result = {}
    for name, drawing in drawings.items():
        with rc_context(STYLE | {'svg.hashsalt': name}):  # the salt makes ids reproducible
            figure = drawing(summary)
            svg, png = io.BytesIO(), io.BytesIO()
            figure.savefig(svg, format='svg', metadata={'Date': None, 'Creator': None})
            figure.savefig(png, format='png', dpi=200, metadata={'Software': None})
        result[name] = {'svg': svg.getvalue().decode(), 'png': png.getvalue()}
    return result


def themed(svg: str, label: str) -> str:
    """A figure as an element of the page: its colours are the page's, its label is read aloud."""
    namespace = 'http://www.w3.org/2000/svg'
    ET.register_namespace('', namespace)
    ET.register_namespace('xlink', 'http://www.w3.org/1999/xlink')
    root = ET.fromstring(svg)
    for metadata in root.findall(f'{{{namespace}}}metadata'):
        root.remove(metadata)
    for size in ('width', 'height'):
        del root.attrib[size]
    root.attrib |= {'role': 'img', 'aria-label': label}
    text = ET.tostring(root, encoding='unicode')
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f'var({variable})')
    return text


def draw_forest(summary: dict[str, Any]):
    """Draw the paired differences from the baseline: each seed's, their mean, its 95% interval."""
    arms = _compared_arms(summary)
    figure = _new_figure()
    _draw_differences(_row_axes(figure, arms, 0.5), summary, arms)
    figure.supxlabel(_difference_label(summary), fontsize=10)
    return figure


def draw_side_by_side(folders: list[Path]):
    """Draw the paired differences of several ablations from their baselines as one figure.

    Ablations of one name are one block of rows, those on the same training images one column.

    Args:
        folders: Their work directories, at least one; the first of a name or of a data set comes
            first in the figure.

    Returns:
        A matplotlib figure.

    Errors:
        UserError: A folder holds no ablation, two belong in one place, or metrics differ.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    blocks = _blocks(folders)
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
        first = next(summary for block in blocks.values() for summary in block.values())
        figure.supxlabel(
            f'{_difference_label(first)}\n'
            'blue: better, orange: worse, grey: not significant (95% intervals, Holm-corrected)',
            fontsize=9,
        )
    return figure


def _blocks(folders: list[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """The summary of each ablation, `{name: {data: summary}}`."""
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    metrics: dict[str, Path] = {}
    for folder in folders:
        results = read_results(folder)
        name, data = results.definition['name'], _data_name(results)
        block = blocks.setdefault(name, {})
        if data in block:
            raise UserError(f'{folder} is a second ablation {name} on {data}; give one of them')
        block[data] = summary_of(results)
        metrics.setdefault(block[data]['metric'], folder)
    if len(metrics) > 1:
        differing = ', '.join(f'{metric} in {folder}' for metric, folder in metrics.items())
        raise UserError(f'the metrics differ: {differing}; give ablations of one metric')
    return blocks


def _data_name(results: Results) -> str:
    """The source of the training images and their split, in a few letters."""
    config = results.definition['configs'][results.definition['baseline']]
    source = Path(config['data.source'].partition(':')[2] or config['data.source']).name
    return f'{source} {config["data.train"]}'


def _new_figure():
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, 3), layout='constrained')


def _row_axes(figure, arms: list[str], height: float = 0.42):
    """Axes of a figure of its own, with one row per arm."""
    figure.set_size_inches(WIDTH, 1.0 + height * len(arms))
    axes = figure.subplots()
    _label_rows(axes, arms)
    return axes


def _label_rows(axes, arms: list[str]) -> None:
    """Make the vertical axis one row per arm, the first on top."""
    labels = ['\n'.join(textwrap.wrap(_short(arm, 36), 20)) for arm in arms]
    axes.set_yticks(range(len(arms)), labels)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(visible=False, axis='y')
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.locator_params(axis='x', nbins=6)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + '…'


def _compared_arms(summary: dict[str, Any]) -> list[str]:
    """All arms but the baseline."""
    return [name for name in summary['arms'] if name != summary['baseline']]


def _difference_label(summary: dict[str, Any]) -> str:
    metric = METRICS[summary['metric']]
    better = 'higher' if metric.sign > 0 else 'lower'
    return f'difference in {metric.title} ({metric.unit}, {better} is better)'


def _draw_differences(axes, summary: dict[str, Any], arms: list[str]) -> None:
    """Draw a row for each arm: its paired differences from the baseline, their mean and interval.

    A row whose arm the summary does not have stays empty.
    """
    metric = METRICS[summary['metric']]
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
        colour, marker, filled = VERDICT_MARKS[arm['verdict']['kind']]
        seeds = [(arm['per_seed'][str(s)] - reference[str(s)]) for s in compared['seeds']]
        scaled = [metric.scale * d for d in seeds]
        axes.plot(scaled, [y + 0.24] * len(seeds), '|', color=colour, markersize=6, alpha=0.8)
        low, high = (metric.scale * end for end in compared['interval'])
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle='butt')
        face = colour if filled else SURFACE
        axes.plot(
            metric.scale * compared['mean'], y, marker, color=colour, markerfacecolor=face, ms=7
        )


def _draw_curves(summary: dict[str, Any], name: str):
    """One panel per arm: mean and range over seeds, with the baseline's evaluation in grey."""
    metric = METRICS[name]
    arms = summary['arms']
    columns = min(2, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = _new_figure()
    figure.set_size_inches(WIDTH, 0.9 + 1.45 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (arm, content) in zip(grid.flat, arms.items()):
        axes.set_title(_short(arm, 24), fontsize=10, loc='left')
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
    measured = any(arm['n'] for arm in arms.values())
    if name == 'loss' and measured:
        _log_scale(grid[0, 0])
    else:
        grid[0, 0].set_ylim(bottom=_lowest_after_start(arms, metric))
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(len(arms) - columns, 0) : len(arms)]:
        axes.tick_params(labelbottom=True)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels())
    }
    figure.legend(handles.values(), handles, loc='outside upper left', ncols=3, fontsize=9)
    figure.supxlabel('epoch', fontsize=10)
    figure.supylabel(f'{metric.title} ({metric.suffix or metric.unit})', fontsize=10)
    return figure


def _line(points: list[dict], metric: Metric, kind: str = 'mean'):
    return (
        [point['epoch'] for point in points],
        [metric.scale * point[f'{metric.name}_{kind}'] for point in points],
    )


def _lowest_after_start(arms: dict[str, Any], metric: Metric) -> float | None:
    """The lowest evaluation result after the first fifth of the epochs, with some air."""
    late = []
    for arm in arms.values():
        points = arm['curves']['eval']
        late += [point[f'{metric.name}_low'] for point in points[len(points) // 5 :]]
    return metric.scale * (min(late) - 0.02) if late else None


def _log_scale(axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_gap(summary: dict[str, Any]):
    """Training and evaluation results of the trained networks, joined: the gap is the length."""
    metric = METRICS[summary['metric']]
    figure = _new_figure()
    axes = _row_axes(figure, list(summary['arms']))
    on_train = {'marker': 's', 'color': ORANGE, 'markerfacecolor': SURFACE, 'markersize': 7}
    on_test = {'marker': 'o', 'color': BLUE, 'markersize': 7}
    for mark, label in ((on_train, 'training'), (on_test, 'test')):
        axes.plot([], [], linestyle='', label=label, **mark)
    for y, arm in enumerate(summary['arms'].values()):
        train, test = (arm[split].get(metric.name, {}).get('mean') for split in ('train', 'eval'))
        if train is None or test is None:
            _write_no_result(axes, y)
            continue
        train, test = train * metric.scale, test * metric.scale
        axes.plot([train, test], [y, y], color=GREY, linewidth=2)
        axes.plot(train, y, **on_train)
        axes.plot(test, y, **on_test)
    figure.supxlabel(f'{metric.title} ({metric.suffix or metric.unit})', fontsize=10)
    figure.legend(loc='outside upper left', ncols=2, fontsize=9)
    return figure


def _draw_calibration(summary: dict[str, Any]):
    """Expected calibration error with its 95% interval."""
    metric = METRICS['calibration_error']
    figure = _new_figure()
    axes = _row_axes(figure, list(summary['arms']))
    for y, arm in enumerate(summary['arms'].values()):
        found = arm['eval'].get(metric.name)
        if not found or found['mean'] is None:
            _write_no_result(axes, y)
            continue
        if found['interval']:
            low, high = (metric.scale * end for end in found['interval'])
            axes.plot([low, high], [y, y], color=BLUE, linewidth=2, solid_capstyle='butt')
        axes.plot(metric.scale * found['mean'], y, 'o', color=BLUE, markersize=7)
    axes.set_xlim(left=0)
    figure.supxlabel('expected calibration error (%, lower is better)', fontsize=10)
    return figure


def _write_no_result(axes, y: int) -> None:
    axes.text(
        0.5, y, 'no result', color=MUTED, va='center', transform=axes.get_yaxis_transform()
    )  # x is a fraction of the width
