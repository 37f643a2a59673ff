"""The report of an ablation: one HTML file without network, and the files behind it."""

import inspect
import itertools
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from cnn_jax.ablation import figures, tables, wording
from cnn_jax.ablation.comparison import EFFECTS
from cnn_jax.ablation.summary import cost, summary_of
from cnn_jax.ablation.theme import themed
from cnn_jax.ablation.workdir import Results, read_results
from cnn_jax.files import write_atomically

LABELS = {
    'forest': 'Forest plot of the paired differences from the baseline',
    'curves_accuracy': 'Learning curves of the accuracy, one panel for each arm',
    'curves_loss': 'Learning curves of the loss, one panel for each arm',
    'gap': 'Results on training and test images of each arm',
    'calibration': 'Expected calibration error of each arm',
}


def write_report(workdir: Path) -> Path:
    """Write what an ablation found, from what is on disk.

    `report.html`, `summary.json`, `summary.csv`, `summary.tex`, `cost.json`, and SVG and PNG
    under `figures/`. The same cells give the same bytes of everything but report and cost, which
    hold times.

    Returns:
        The path of `report.html`.

    Errors:
        UserError: The folder holds no ablation, or a file in it is damaged.
    """
    results = read_results(workdir)
    summary = summary_of(results)
    spent = cost(results)
    drawn = figures.draw(summary)
    files: dict[str, str | bytes] = {
        'summary.json': to_json(summary),
        'summary.csv': tables.to_csv(summary),
        'summary.tex': tables.to_latex(summary),
        'cost.json': to_json(spent),
    }
    for name, figure in drawn.items():
        files[f'figures/{name}.svg'] = figure['svg']
        files[f'figures/{name}.png'] = figure['png']
    files['report.html'] = render(results, summary, spent, drawn)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        write_atomically(workdir / name, lambda file, data=data: file.write(data))
    return workdir / 'report.html'


def render(
    results: Results,
    summary: dict[str, Any],
    spent: dict[str, Any],
    drawn: dict[str, dict[str, Any]],
) -> str:
    """The page; every name and text from outside is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    headline, *details = inspect.cleandoc(summary['question']).split('\n\n')
    arms = summary['arms'].values()
    methods = {arm['eval'][summary['metric']]['interval_method'] for arm in arms} - {None}
    return environment.get_template('report.jinja').render(
        ablation=results.ablation,
        summary=summary,
        cost=spent,
        headline=headline or summary['name'],
        # An answer in an experiment's docstring, and what follows it, is of an earlier run.
        details=[
            block.strip('\n')
            for block in itertools.takewhile(lambda each: not each.startswith('Answer'), details)
        ],
        data=results.ablation['configs'][summary['baseline']],
        examples=max((arm['examples'] or 0 for arm in arms), default=0),
        methods=sorted(methods),
        effects=EFFECTS,
        manifest=json.dumps(results.ablation['manifest'], indent=2, ensure_ascii=False),
        figures={
            name: Markup(themed(figure['svg'], LABELS[name])) for name, figure in drawn.items()
        },
        metrics=wording.METRICS,
        dedent=textwrap.dedent,
        number=wording.number,
        estimate=wording.estimate,
        p_value=wording.p_value,
    )


def to_json(content: Any) -> str:
    """Indented JSON ending in a newline; a number that is not finite is null."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + '\n'


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
