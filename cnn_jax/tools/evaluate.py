"""Evaluate a run on a split: metrics, confusion matrix, calibration."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from cnn_jax import config as cfg
from cnn_jax.data.batches import open_batches
from cnn_jax.errors import UserError
from cnn_jax.files import write_text
from cnn_jax.tools.figures import draw_confusion, draw_reliability
from cnn_jax.train import metrics, setup
from cnn_jax.train.loop import shard_state
from cnn_jax.train.program import traced_values
from cnn_jax.train.run import Run
from cnn_jax.train.step import eval_step

FILES = ('evaluation.json', 'confusion.png', 'reliability.png')


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    `seen` is whether these are the images that the run itself was evaluated on; `notes` say what
    there is to say of the data.
    """

    split: str
    sums: metrics.Sums
    metrics: dict[str, Any]
    seen: bool
    notes: tuple[str, ...] = ()


def evaluate(run: Run, split: str = '', data: Any = None) -> Evaluation:
    """Compute the metrics of a run on a split, in inference.

    Args:
        run: An opened run.
        split: The split; '' for the run's config.data.eval.
        data: A `Source` or arrays in the place of the config's data.

    Errors:
        UserError: The data cannot be had, or their classes are not those of the run.
    """
    config, split = run.config, split or run.config.data.eval
    described, layout = run.manifest['data'], setup.layout_of(config)
    if data is None and config.data.source == cfg.OWN:
        raise UserError('the run was trained on own data; give those to evaluate on as data=…')
    batches = open_batches(
        cfg.replace(config, {'data.eval': split}).data,
        'eval',
        source=data,
        sharding=layout.batch if layout else None,
    )
    if list(batches.class_names) != run.class_names:
        raise UserError(
            f'the classes of {config.data.source} are {", ".join(batches.class_names)} now, but '
            f'the run was trained on {", ".join(run.class_names)}; restore them'
        )
    copies = layout.replicated if layout else None
    compute = jax.jit(functools.partial(eval_step, run.program), out_shardings=copies)
    state, values = shard_state(run.state, layout), traced_values(config)
    sums = metrics.sum_over(lambda batch: compute(state, batch, values), batches.evaluate())
    seen = batches.fingerprint == described['eval']['fingerprint']
    return Evaluation(split, sums, metrics.result(sums), seen, batches.notes)


def write_evaluation(run: Run, evaluation: Evaluation, folder: Path) -> None:
    """Write `FILES`: the metrics as JSON, the confusion matrix and the reliability diagram."""
    result = evaluation.metrics
    content = {'split': evaluation.split, 'step': run.step, **metrics.as_json(result)}
    rows = ',\n    '.join(map(json.dumps, result['confusion'].tolist()))  # K lines, not K²
    text = json.dumps(content, indent=2).removesuffix('\n}')
    write_text(folder / FILES[0], f'{text},\n  "confusion": [\n    {rows}\n  ]\n}}\n')
    draw_confusion(result['confusion'], run.class_names, folder / FILES[1])
    draw_reliability(evaluation.sums, folder / FILES[2])
