"""Several ablations in one picture: what each arm bought, a column for each data set."""

from pathlib import Path
from typing import Any

from cnn_jax.ablation import figures
from cnn_jax.ablation.summary import summary_of
from cnn_jax.ablation.theme import STYLE
from cnn_jax.ablation.workdir import Results, read_results
from cnn_jax.errors import UserError

LABELS, COLUMN, ROW = 1.7, 2.4, 0.3  # inches


def draw(folders: list[Path]):
    """The paired differences of ablations from their baselines, as one figure.

    Ablations of one name are one block of rows, those on the same training images one column.

    Args:
        folders: Their work directories, at least one; the first of a name or of a data set comes
            first in the figure.

    Returns:
        A matplotlib figure.

    Errors:
        UserError: A folder holds no ablation, two have the same place, or metrics differ.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    blocks = _arranged(folders)
    columns = list(dict.fromkeys(data for block in blocks.values() for data in block))
    rows = {name: _rows_of(block) for name, block in blocks.items()}
    heights = [len(arms) + 1 for arms in rows.values()]
    style: Any = STYLE | {'font.size': 9}
    with rc_context(style):
        size = LABELS + COLUMN * len(columns), 0.8 + ROW * sum(heights)
        figure = Figure(figsize=size, layout='constrained')
        grid = figure.subplots(
            len(blocks), len(columns), squeeze=False, sharex=True, height_ratios=heights
        )
        for line, (name, block) in zip(grid, blocks.items()):
            for axes, data in zip(line, columns):
                figures.label_rows(axes, rows[name])
                axes.tick_params(labelleft=axes is line[0])
                if data in block:
                    figures.draw_differences(axes, block[data], rows[name])
            line[0].set_title(name, loc='left', fontweight='bold', x=0, ha='right')
        for axes, data in zip(grid[0], columns):
            axes.set_title(data)
        first = next(summary for block in blocks.values() for summary in block.values())
        figure.supxlabel(
            f'{figures.difference_label(first)}\n'
            'blue: better, orange: worse, grey: not told apart (95% intervals, Holm-corrected)',
            fontsize=9,
        )
    return figure


def _arranged(folders: list[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """The summary of each ablation, `{name: {data: summary}}`."""
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    metrics: dict[str, Path] = {}
    for folder in folders:
        results = read_results(folder)
        name, data = results.ablation['name'], _data(results)
        block = blocks.setdefault(name, {})
        if data in block:
            raise UserError(f'{folder} is a second ablation {name} on {data}; give one of them')
        block[data] = summary_of(results)
        metrics.setdefault(block[data]['metric'], folder)
    if len(metrics) > 1:
        differing = ', '.join(f'{metric} in {folder}' for metric, folder in metrics.items())
        raise UserError(f'the metrics differ: {differing}; give ablations of one metric')
    return blocks


def _rows_of(block: dict[str, dict[str, Any]]) -> list[str]:
    """The arms that one of the ablations has, besides its baseline."""
    return list(
        dict.fromkeys(arm for each in block.values() for arm in figures.compared_arms(each))
    )


def _data(results: Results) -> str:
    """The source of the training images and the split of it, in a few letters."""
    ablation = results.ablation
    config = ablation['configs'][ablation['baseline']]
    source = Path(config['data.source'].partition(':')[2] or config['data.source']).name
    return f'{source} {config["data.train"]}'
