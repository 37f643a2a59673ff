"""The pictures of a run: learning curves, reliability diagram; the style of those in a page.

Those are drawn 360 points wide, so that their text is readable on a phone, with colours that
differ in lightness as well as in hue.
"""

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cnn_jax.files import replacing

# Colours of the light theme by the CSS variables that replace them in the page.
COLOURS = {
    **{'ink': '#1b1f24', 'muted': '#57606b', 'rule': '#d1d7de', 'surface': '#fefefe'},
    **{'blue': '#0069a8', 'orange': '#b34a00', 'grey': '#6b7480'},
}
INK, MUTED, RULE, SURFACE, BLUE, ORANGE, GREY = COLOURS.values()
STYLE: Any = {
    'text.parse_math': False,  # an arm's name is text, whatever it holds
    'font.size': 10,  # at 390 px the page shows 360 points as 337 px: smaller is not legible
    **dict.fromkeys(('axes.titlesize', 'figure.labelsize'), 10),
    **{'font.family': 'sans-serif', 'svg.fonttype': 'none', 'axes.facecolor': 'none'},
    **{'lines.linewidth': 1.6, 'grid.linewidth': 0.6, 'grid.color': RULE},
    **dict.fromkeys(('figure.facecolor', 'savefig.facecolor'), SURFACE),
    **dict.fromkeys(('axes.edgecolor', 'xtick.color', 'ytick.color'), MUTED),
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'xtick.labelcolor', 'ytick.labelcolor'), INK),
    **dict.fromkeys(('axes.spines.top', 'axes.spines.right', 'legend.frameon'), False),
    **dict.fromkeys(('axes.grid', 'axes.axisbelow'), True),
}
WIDTH = 5.0  # inches, at 72 points each


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def save(figure: Any, file: Path | BinaryIO, **options: Any) -> None:
    """Save a figure as a PNG, or as the options of `savefig` say; `file` is replaced as a whole.

    A letter that its font lacks becomes a box, which needs no warning.
    """
    if isinstance(file, Path):
        with replacing(file) as temporary, temporary.open('wb') as opened:
            save(figure, opened, **options)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        figure.savefig(file, **{'format': 'png', 'dpi': 120, **options})


def as_files(drawing: Callable[[], Any], name: str) -> dict[str, Any]:
    """A figure that a function draws, in the style of a page, as `{'svg': text, 'png': bytes}`."""
    from matplotlib import rc_context

    with rc_context(STYLE | {'svg.hashsalt': name}):  # the salt makes ids reproducible
        figure = drawing()
        svg, png = io.BytesIO(), io.BytesIO()
        save(figure, svg, format='svg', metadata={'Date': None, 'Creator': None})
        save(figure, png, dpi=200, metadata={'Software': None})
    return {'svg': svg.getvalue().decode(), 'png': png.getvalue()}


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


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Write `curves_figure` as a PNG; without any lines, nothing is drawn."""
    if lines:
        save(curves_figure(lines), path)


def curves_figure(lines: list[dict[str, Any]]) -> Any:
    """A figure of loss and accuracy against epochs, in training (regularized) and evaluation.

    Args:
        lines: The lines of `metrics.jsonl`.
    """
    figure = new_figure(9, 3.6)
    for axes, name in zip(figure.subplots(1, 2), ('loss', 'accuracy')):
        for split, style, label in (
            ('train', '--', 'training, regularized'),
            ('eval', '-', 'evaluation'),
        ):
            points = [(line['epoch'], line[name]) for line in lines if line['split'] == split]
            axes.plot(*np.transpose(points), style, marker='.', label=label)
        axes.set(xlabel='epoch', ylabel='loss (nats)' if name == 'loss' else name)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def reliability_figure(bins: list[dict[str, Any]]) -> Any:
    """A figure of accuracy against confidence, and of the number of images, by bins of confidence.

    On the diagonal, probabilities are calibrated; below it, they are too high.

    Args:
        bins: `from`, `to`, `count`, `confidence` and `accuracy` of each that is not empty.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", figure 1.
    """
    figure = new_figure(WIDTH, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    edges = [each['from'] for each in bins], [each['to'] - each['from'] for each in bins]
    options = {'align': 'edge', 'edgecolor': SURFACE, 'linewidth': 1}
    upper.bar(edges[0], [each['accuracy'] for each in bins], edges[1], color=BLUE, **options)
    upper.plot([0, 1], [0, 1], color=INK, linestyle=(0, (4, 3)), linewidth=1, label='calibrated')
    points = ([each[name] for each in bins] for name in ('confidence', 'accuracy'))
    label = 'mean confidence of the bin'
    upper.plot(*points, 'D', color=ORANGE, markersize=5, clip_on=False, label=label)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel='accuracy')
    upper.legend(loc='upper left')
    counts = lower.bar(edges[0], [each['count'] for each in bins], edges[1], color=GREY, **options)
    lower.bar_label(counts, fmt='{:,.0f}', rotation=90, padding=2)
    lower.margins(y=0.9)
    lower.set(xlabel='confidence', ylabel='images')
    return figure
