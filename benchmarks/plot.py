"""A figure of the results: each workload's times as multiples of its best peer's.

  python -m benchmarks.plot --results=benchmarks/RESULTS.md --out=docs/speed.png

Reads the tables of the results file, so the figure shows what stands there and nothing else.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import cli, results
from cnn_jax.errors import UserError

OURS = 'cnn_jax'
CONTROL = 'Flax with our runtime settings'  # explains ours, and is nobody's
RATIOS = re.compile(rf'{results.OF_BEST}|of {OURS}')
LONGEST = 5.0  # multiples; longer bars are cut and say so


class Workload(NamedTuple):
    """A column of ratios in the results: of each contender's time to the best peer's."""

    title: str  # the section's, and the column's if the section has several
    ratios: dict[str, float]


def main() -> None:
    """Draw."""
    parser = cli.parser('benchmarks.plot', __doc__)
    parser.add_argument('--results', type=Path, default=Path('benchmarks/RESULTS.md'))
    parser.set_defaults(out=Path('docs/speed.png'))
    given = parser.parse_args()
    found = list(workloads(given.results.read_text())) if given.results.exists() else []
    if not found:
        raise UserError(f'{given.results} has no ratios to peers; run a workload with --out first')
    draw(found, given.out)


def workloads(text: str) -> Iterator[Workload]:
    """The workloads of a results file.

    A column of ratios to this project becomes one of ratios to the best peer.
    """
    for section in re.split(r'(?m)^## ', text)[1:]:
        title = section.splitlines()[0]
        lines = [line for line in section.splitlines() if line.startswith('| ')]
        if not lines:
            continue
        columns, *rows = ([cell.strip() for cell in line.strip('|').split('|')] for line in lines)
        found = [i for i, column in enumerate(columns) if RATIOS.search(column)]
        for i in found:
            of = {row[0]: float(row[i].split()[0]) for row in rows if not row[0].startswith('---')}
            peers = [ratio for name, ratio in of.items() if not is_ours(name) and name != CONTROL]
            if OURS not in of or not peers:
                continue
            kind = f', {columns[i - 1].split(",")[0]}' if len(found) > 1 else ''
            best = 1.0 if results.OF_BEST in columns[i] else min(peers)
            yield Workload(title + kind, {name: ratio / best for name, ratio in of.items()})


def is_ours(name: str) -> bool:
    """Whether a row is one of this project's."""
    return name.startswith(OURS)


def draw(found: list[Workload], out: Path) -> None:
    """Horizontal bars, a panel for each workload, the fastest on top."""
    from matplotlib.figure import Figure

    pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
    heights = [max(len(each.ratios) for each in pair) for pair in pairs]
    size = 11, 0.21 * sum(heights) + 0.6 * len(pairs) + 0.3
    figure = Figure(size, layout='constrained', dpi=110)
    grid = figure.subplots(len(pairs), 2, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, workload in zip(grid.flat, found):
        panel(axes, workload)
    figure.supxlabel('time, as a multiple of the best peer’s: shorter is faster', fontsize=8.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def panel(axes, workload: Workload) -> None:
    """The bars of a workload."""
    names, ratios = zip(*sorted(workload.ratios.items(), key=lambda item: -item[1]))
    lengths = [min(ratio, LONGEST) for ratio in ratios]
    axes.set_axis_on()
    axes.barh(names, lengths, color=[color(name) for name in names])
    axes.axvline(1, color='black', linewidth=0.8)
    for y, (ratio, length) in enumerate(zip(ratios, lengths)):
        text = f'{ratio:.2f}{" (cut)" * (ratio > LONGEST)}'
        axes.annotate(
            *(text, (length, y), (3, 0)),
            textcoords='offset points',
            va='center',
            fontsize=7,
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
        )
    axes.set_xlim(0, LONGEST + 0.8)
    axes.set_title(workload.title, fontsize=9, loc='left', fontweight='bold')
    axes.tick_params(labelsize=7.5, left=False)
    axes.spines[['top', 'right', 'left']].set_visible(False)


def color(name: str) -> str:
    """Of a contender's bar: this project's default, its variants, the control, and peers."""
    if name == OURS:
        return '#c2410c'
    if is_ours(name):
        return '#fdba74'
    return '#dbe1e8' if name == CONTROL else '#94a3b8'


if __name__ == '__main__':
    cli.run(main)
