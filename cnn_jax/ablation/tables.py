"""The summary as `summary.csv` and as a LaTeX table."""

import csv
import io
from typing import Any

from cnn_jax.ablation import wording

COLUMNS: tuple[str, ...] = (
    'arm',
    'n',
    'mean',
    'sd',
    'low',
    'high',
    'pairs',
    'difference',
    'difference_low',
    'difference_high',
    'p_t',
    'p_t_corrected',
    'p_sign_flip',
    'p_sign_flip_corrected',
    'effect_size',
    'hedges_g',
    'detectable',
    'gap',
    'calibration_error',
    'parameters',
    'verdict',
)


def to_csv(summary: dict[str, Any]) -> str:
    """One line per arm, in natural units; what does not exist is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    for name, arm in summary['arms'].items():
        metric = arm['eval'][summary['metric']]
        low, high = metric['interval'] or (None, None)
        row = {
            'arm': name,
            'n': arm['n'],
            'mean': metric['mean'],
            'sd': metric['sd'],
            'low': low,
            'high': high,
            'gap': arm['gap']['mean'],
            'calibration_error': arm['eval'].get('calibration_error', {}).get('mean'),
            'parameters': arm['parameters'],
            'verdict': arm['verdict']['kind'] if arm['verdict'] else 'baseline',
        }
        if compared := arm['against_baseline']:
            row |= {key: compared[key] for key in COLUMNS if key in compared and key not in row}
            row |= {'pairs': compared['n'], 'difference': compared['mean']}
            row['p_t_corrected'] = compared['p_corrected']
            row['difference_low'], row['difference_high'] = compared['interval']
        writer.writerow(row)
    return text.getvalue()


def to_latex(summary: dict[str, Any]) -> str:
    """A table for a paper; needs the package booktabs."""
    metric = wording.METRICS[summary['metric']]
    unit = r'\%' if metric.suffix else metric.unit
    rows = [_latex_row(name, arm, metric) for name, arm in summary['arms'].items()]
    decision = summary['decision']
    caption = (
        f'{_escape(metric.title.capitalize())} on the evaluation split: mean and 95\\% confidence '
        f'interval over seeds; $\\Delta$: paired difference from {_escape(summary["baseline"])} '
        f'with 95\\% confidence interval; $p$: paired $t$ test, Holm-corrected for '
        f'{decision["comparisons"]} comparisons; gap: how much worse on the evaluation than on '
        'the training split.'
    )
    lines = [
        r'\begin{table}',
        r'  \centering',
        f'  \\caption{{{caption}}}',
        r'  \begin{tabular}{lrllrr}',
        r'    \toprule',
        f'    Arm & $n$ & {_escape(metric.title.capitalize())} ({unit}) & '
        f'$\\Delta$ ({metric.unit}) & $p$ & Gap \\\\',
        r'    \midrule',
        # {}: the line before looks for a [ or * at the beginning of an arm's name.
        *(f'    {{}}{row} \\\\' for row in rows),
        r'    \bottomrule',
        r'  \end{tabular}',
        r'\end{table}',
    ]
    return '\n'.join(lines) + '\n'


def _latex_row(name: str, arm: dict[str, Any], metric: wording.Metric) -> str:
    compared = arm['against_baseline']
    cells = [
        _escape(name),
        str(arm['n']),
        wording.estimate(arm['eval'][metric.name], metric),
        wording.estimate(compared, metric, signed=True) if compared else '–',
        wording.p_value(compared['p_corrected']).removeprefix('= ') if compared else '–',
        wording.estimate({**arm['gap'], 'interval': None}, metric),
    ]
    signs = {'−': '$-$', '–': '--', '<': '$<$'}
    return ' & '.join([cells[0], *(_replace(cell, signs) for cell in cells[1:])])


def _escape(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    special = {
        '\\': r'\textbackslash{}',
        '~': r'\textasciitilde{}',
        '^': r'\textasciicircum{}',
        '<': r'\textless{}',
        '>': r'\textgreater{}',
        **{character: f'\\{character}' for character in '&%$#_{}'},
    }
    return _replace(text, special)


def _replace(text: str, by: dict[str, str]) -> str:
    return ''.join(by.get(character, character) for character in text)
