"""The report of an ablation: one HTML file without network, and the files behind it."""

import functools
import inspect
import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax.ablation import figures
from cnn_jax.ablation import summary as words
from cnn_jax.ablation.plan import METRICS
from cnn_jax.ablation.results import (
    DEFINITION,
    Store,
    read_store,
    refuse_links,
    understood,
    why_failed,
)
from cnn_jax.ablation.summary import cost, summary_of
from cnn_jax.errors import printable
from cnn_jax.fields import get
from cnn_jax.files import write_bytes
from cnn_jax.tools.figures import STYLE, themed
from cnn_jax.tools.page import number, template, to_json, write_csv
from cnn_jax.train.trackers import plain, tracked

LABELS = {
    'forest': 'Differences from the controls',
    'response': 'The trials on the held-out images',
    'curves_accuracy': 'Accuracy while training',
    'curves_loss': 'Loss while training',
}
MARKS = {
    **{'better': '▲', 'worse': '▼', 'mixed': '◆'},
    **{'equivalent': '=', 'undecided': '○', 'no claim': '–'},
}


@dataclass(frozen=True)
class Ablation:
    """The results of an ablation, read from its work directory.

    >>> result = Ablation(Path('runs/regularization'))
    >>> print(result)                          # the verdicts
    >>> result.table[2]['difference']          # a row per arm and measure, for pandas.DataFrame
    >>> result.plot()                          # differences with simultaneous intervals
    """

    workdir: Path
    interrupted: bool = False  # whether training was asked to stop before its end

    @functools.cached_property
    def store(self) -> Store:
        """The results on disk."""
        return read_store(self.workdir)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`, as `summary_of` describes it."""
        with understood(self.workdir):
            return summary_of(self.store)

    @property
    def verdicts(self) -> dict[str, str]:
        """A sentence on each arm but the baseline."""
        arms = self.summary['arms'].items()
        return {name: arm['verdict']['sentence'] for name, arm in arms if arm['verdict']}

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each arm and primary measure, as in `summary.csv`, in natural units.

        `mean` is of the replicates that finished; in `difference` a failed one counts as a guess.
        """
        rows, arms = [], self.summary['arms'].items()
        for (name, arm), measure in itertools.product(arms, self.summary['primaries']):
            compared, test = arm['compared'].get(measure) or {}, arm['test'].get(measure) or {}
            verdict = compared.get('verdict', 'no claim') if arm['control'] else 'baseline'
            row = {'arm': name, 'control': arm['control'], 'measure': measure, 'n': arm['n']}
            row |= {'mean': test.get('mean'), 'difference': compared.get('mean')}
            row |= {key: compared.get(key) for key in ('low', 'high', 'p')}
            row |= {'verdict': verdict, 'decided': compared.get('decided')}
            rows.append(row | {'failed': arm['failed'][measure]})
        return rows

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The failed runs: `kind`, `arm`, `seed`, `trial`, `reason`."""
        return self.summary['runs']['failed']

    def plot(self):
        """Draw the differences of the arms from their controls; returns a matplotlib figure."""
        from matplotlib import rc_context

        with rc_context(STYLE):
            return figures.draw_forest(self.summary)

    def write_report(self) -> Path:
        """Write the report from what is on disk; returns the path of `report.html`.

        Beside it `summary.json`, `summary.csv`, `cost.json`, and SVG and PNG under `figures/`. The
        same results give the same bytes, but for the times in report and cost.
        """
        refuse_links(self.workdir)
        with understood(self.workdir):
            files, table = self._files(), self.table
        write_csv(table, self.workdir / 'summary.csv')
        for name, content in files.items():
            if isinstance(content, str):  # what no UTF-8 can hold is written as JSON has it
                content = content.encode(errors='backslashreplace')
            write_bytes(self.workdir / name, content)
        return self.workdir / 'report.html'

    def log_to(self, trackers: Sequence[str]) -> None:
        """Log each replicate, once, with what arms change and tune; names as of `ablate`."""
        plan = self.store.plan
        paths = {path for arm in plan.configs for path in (*plan.changes[arm], *plan.ranges[arm])}
        for arm, index in itertools.product(plan.configs, range(len(plan.seeds))):
            for run in self.store.replicates(arm, index):
                folder, result = self.workdir / 'tracked' / run.path.stem, self.store.result(run)
                new = [name for name in trackers if not (folder / f'{name}.done').exists()]
                if not new or not result or why_failed(result):
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                config = plain({path: get(run.config, path) for path in sorted(paths)})
                config |= {'arm': arm, 'seed': run.seed}
                found = result['metrics']['test'].items()
                final = {name: value for name, value in found if isinstance(value, float)}
                with tracked(new, folder, f'{plan.name} {run.path.stem}', config) as tell:
                    tell('hyperparameters', config, final)
                for name in new:
                    (folder / f'{name}.done').touch()

    def _files(self) -> dict[str, str | bytes]:
        """The content of the report's files, by their names."""
        drawn, spent = figures.draw(self.summary), cost(self.store)
        return {
            'summary.json': to_json(self.summary),
            'cost.json': to_json(spent),
            **{f'figures/{f}.{kind}': each[kind] for f, each in drawn.items() for kind in each},
            'report.html': render(self.store, self.summary, spent, drawn),
        }

    def __repr__(self) -> str:
        if not (self.workdir / DEFINITION).exists():
            return f'Ablation in {self.workdir}: nothing was trained'
        runs, name = self.summary['runs'], self.summary['name']
        finished = f'{runs["due"] - len(runs["missing"])} of {runs["due"]} runs'
        failed = f', {len(runs["failed"])} failed' if runs['failed'] else ''
        lines = [f'Ablation {name} in {self.workdir}: {finished}{failed}', *self.verdicts.values()]
        return printable('\n'.join(lines), keep='\n')


def render(store: Store, summary: Any, spent: dict[str, Any], drawn: dict[str, Any]) -> str:
    """The page; every name and text from outside is escaped."""
    from markupsafe import Markup

    headline, *details = inspect.cleandoc(summary['question']).split('\n\n')
    definition, arms = store.definition(), summary['arms']
    titled = {'title': lambda m: f'{METRICS[m].title}, {METRICS[m].suffix or "nats"}'}
    return template(Path(__file__).with_suffix('.jinja'), **titled).render(
        summary=summary,
        arms=arms,
        compared={name: arm['compared'] for name, arm in arms.items() if arm['verdict']},
        cost=spent,
        headline=headline or summary['name'],
        details=[block.strip('\n') for block in details],
        budgets=definition['budgets'],
        command=definition['command'],
        data=store.plan.configs[store.plan.baseline].data,
        manifest=json.dumps(definition['manifest'], indent=2, ensure_ascii=False),
        figures={f: Markup(themed(each['svg'], LABELS[f])) for f, each in drawn.items()},
        **{'metrics': METRICS, 'marks': MARKS, 'labels': LABELS, 'checks': words.CHECKS},
        **{'number': number, 'estimate': words.estimate, 'p_value': words.p_value},
        dedent=textwrap.dedent,
    )
