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
from cnn_jax.train.metrics import BINS, Sums

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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
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


def draw_confusion(confusion: np.ndarray, class_names: list[str], path: Path) -> None:
    """The confusion matrix: row = true class, colour = share of the row, number = examples."""
    from matplotlib.figure import Figure

    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    classes = len(class_names)
    side = float(np.clip(2 + 0.45 * classes, 4, 18))
    figure = Figure(figsize=(side, side), layout='constrained')
    axes = figure.subplots()
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    ticks = range(classes) if classes <= 40 else range(0, classes, classes // 20)
    labels = [class_names[i] for i in ticks]
    turned = 90 if max(map(len, labels)) > 2 else 0
    axes.set_xticks(ticks, labels, rotation=turned, parse_math=False)  # names may hold dollars
    axes.set_yticks(ticks, labels, parse_math=False)
    axes.set(xlabel='predicted', ylabel='true')
    if classes <= 30:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = 'white' if share[i, j] > 0.5 else 'black'
                axes.text(j, i, str(count), ha='center', va='center', color=colour, fontsize=8)
    save(figure, path)


def draw_reliability(sums: Sums, path: Path) -> None:
    """Accuracy against confidence in `BINS` bins (Guo et al. 2017); the diagonal is calibrated."""
    from matplotlib.figure import Figure

    count = np.asarray(sums['bin_count'])
    accuracy = np.asarray(sums['bin_correct']) / np.maximum(count, 1)
    figure = Figure(figsize=(4.5, 4.5), layout='constrained')
    axes = figure.subplots()
    centres = (np.arange(BINS) + 0.5) / BINS
    axes.bar(centres, accuracy, width=0.9 / BINS, alpha=0.8, label='accuracy')
    axes.bar(centres, count / max(count.sum(), 1), width=0.4 / BINS, label='share of examples')
    axes.plot([0, 1], [0, 1], 'k--', linewidth=1)
    axes.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    save(figure, path)
