"""The figures of an ablation: paired differences, learning curves, gap, calibration.

They are drawn 360 points wide, so that their text is readable on a phone, with colours that
differ in lightness as well as in hue.
"""

import io
import math
import textwrap
from typing import Any

from cnn_jax.ablation import wording
from cnn_jax.ablation.theme import BLUE, GREY, MUTED, ORANGE, STYLE, SURFACE

WIDTH = 5.0  # inches, at 72 points each
VERDICT_MARKS = {  # kind: colour, marker, filled
    'better': (BLUE, 'o', True),
    'worse': (ORANGE, 'D', True),
    'inconclusive': (GREY, 'o', False),
}


def draw(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure as `{name: {'svg': text, 'png': bytes}}`; the same summary, the same SVG."""
    from matplotlib import rc_context

    drawings = {
        'forest': _forest,
        'curves_accuracy': lambda s: _curves(s, 'accuracy'),
        'curves_loss': lambda s: _curves(s, 'loss'),
        'gap': _gap,
        'calibration': _calibration,
    }
    result = {}
    for name, drawing in drawings.items():
        style: Any = STYLE | {'svg.hashsalt': name}  # the salt makes the SVG's ids reproducible
        with rc_context(style):
            figure = drawing(summary)
            svg, png = io.BytesIO(), io.BytesIO()
            figure.savefig(svg, format='svg', metadata={'Date': None, 'Creator': None})
            figure.savefig(png, format='png', dpi=200, metadata={'Software': None})
        result[name] = {'svg': svg.getvalue().decode(), 'png': png.getvalue()}
    return result


def _rows(figure, arms: list[str], height: float = 0.42):
    """Axes of a figure of its own, with one row per arm."""
    figure.set_size_inches(WIDTH, 1.0 + height * len(arms))
    axes = figure.subplots()
    label_rows(axes, arms)
    return axes


def label_rows(axes, arms: list[str]) -> None:
    """Make the vertical axis one row per arm, the first on top."""
    labels = ['\n'.join(textwrap.wrap(_short(arm, 36), 20)) for arm in arms]
    axes.set_yticks(range(len(arms)), labels)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(visible=False, axis='y')
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.locator_params(axis='x', nbins=6)


def _new_figure():
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, 3), layout='constrained')


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + '…'


def _forest(summary: dict[str, Any]):
    """Paired differences from the baseline: each seed's, their mean, its 95% interval."""
    arms = compared_arms(summary)
    figure = _new_figure()
    draw_differences(_rows(figure, arms, 0.5), summary, arms)
    figure.supxlabel(difference_label(summary), fontsize=10)
    return figure


def compared_arms(summary: dict[str, Any]) -> list[str]:
    """All arms but the baseline."""
    return [name for name in summary['arms'] if name != summary['baseline']]


def difference_label(summary: dict[str, Any]) -> str:
    """What the horizontal axis of differences shows."""
    metric = wording.METRICS[summary['metric']]
    better = 'higher' if metric.sign > 0 else 'lower'
    return f'difference in {metric.title} ({metric.unit}, {better} is better)'


def draw_differences(axes, summary: dict[str, Any], arms: list[str]) -> None:
    """A row for each arm: its paired differences from the baseline, their mean and interval.

    A row whose arm the summary does not have stays empty.
    """
    metric = wording.METRICS[summary['metric']]
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


def _curves(summary: dict[str, Any], name: str):
    """One panel per arm: mean and range over seeds, with the baseline's evaluation in grey."""
    metric = wording.METRICS[name]
    arms = summary['arms']
    columns = min(2, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = _new_figure()
    figure.set_size_inches(WIDTH, 0.9 + 1.45 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (arm, content) in zip(grid.flat, arms.items()):
        axes.set_title(_short(arm, 24), fontsize=10, loc='left')
        baseline = arms[summary['baseline']]['curves']['eval']
        if arm != summary['baseline']:
            line = _line(baseline, name, 'mean', metric)
            axes.plot(*line, ':', color=GREY, label='baseline, test')
        for split, colour, style, shown in (
            ('train', ORANGE, '--', 'training'),
            ('eval', BLUE, '-', 'test'),
        ):
            points = content['curves'][split]
            marker = '.' if len(points) < 12 else ''
            epochs, mean = _line(points, name, 'mean', metric)
            low, high = (_line(points, name, end, metric)[1] for end in ('low', 'high'))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(epochs, mean, style, color=colour, marker=marker, label=shown)
    measured = any(arm['n'] for arm in arms.values())
    if name == 'loss' and measured:
        _log_scale(grid[0, 0])
    else:
        grid[0, 0].set_ylim(bottom=_lowest_after_start(arms, name, metric))
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


def _line(points: list[dict], name: str, kind: str, metric: wording.Metric):
    return (
        [point['epoch'] for point in points],
        [metric.scale * point[f'{name}_{kind}'] for point in points],
    )


def _lowest_after_start(arms: dict[str, Any], name: str, metric: wording.Metric) -> float | None:
    """The lowest evaluation result after the first fifth of the epochs, with some air."""
    late = []
    for arm in arms.values():
        points = arm['curves']['eval']
        late += [point[f'{name}_low'] for point in points[len(points) // 5 :]]
    return metric.scale * (min(late) - 0.02) if late else None


def _log_scale(axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _gap(summary: dict[str, Any]):
    """Training and evaluation results of the trained networks, joined: the gap is the length."""
    metric = wording.METRICS[summary['metric']]
    figure = _new_figure()
    axes = _rows(figure, list(summary['arms']))
    on_train = {'marker': 's', 'color': ORANGE, 'markerfacecolor': SURFACE, 'markersize': 7}
    on_test = {'marker': 'o', 'color': BLUE, 'markersize': 7}
    for mark, label in ((on_train, 'training'), (on_test, 'test')):
        axes.plot([], [], linestyle='', label=label, **mark)
    for y, arm in enumerate(summary['arms'].values()):
        train, test = (arm[split].get(metric.name, {}).get('mean') for split in ('train', 'eval'))
        if train is None or test is None:
            axes.text(0.5, y, 'no result', color=MUTED, va='center', transform=_row_axis(axes))
            continue
        train, test = train * metric.scale, test * metric.scale
        axes.plot([train, test], [y, y], color=GREY, linewidth=2)
        axes.plot(train, y, **on_train)
        axes.plot(test, y, **on_test)
    figure.supxlabel(f'{metric.title} ({metric.suffix or metric.unit})', fontsize=10)
    figure.legend(loc='outside upper left', ncols=2, fontsize=9)
    return figure


def _calibration(summary: dict[str, Any]):
    """Expected calibration error with its 95% interval."""
    metric = wording.METRICS['calibration_error']
    figure = _new_figure()
    axes = _rows(figure, list(summary['arms']))
    for y, arm in enumerate(summary['arms'].values()):
        found = arm['eval'].get(metric.name)
        if not found or found['mean'] is None:
            axes.text(0.5, y, 'no result', color=MUTED, va='center', transform=_row_axis(axes))
            continue
        if found['interval']:
            low, high = (metric.scale * end for end in found['interval'])
            axes.plot([low, high], [y, y], color=BLUE, linewidth=2, solid_capstyle='butt')
        axes.plot(metric.scale * found['mean'], y, 'o', color=BLUE, markersize=7)
    axes.set_xlim(left=0)
    figure.supxlabel('expected calibration error (%, lower is better)', fontsize=10)
    return figure


def _row_axis(axes):
    """Coordinates whose x is a share of the width and whose y is the row."""
    return axes.get_yaxis_transform()
