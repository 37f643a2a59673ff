"""Training one cell, with steps that were compiled for all cells of its structure."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cnn_jax import config as cfg
from cnn_jax.data.batches import DeviceBatches
from cnn_jax.data.memory import Arrays
from cnn_jax.train import metrics, setup
from cnn_jax.train.loop import compilations, sum_metrics
from cnn_jax.train.step import State, Steps, make_steps, values_of
from cnn_jax.train.task import Task


@dataclass(frozen=True)
class Compiled:
    """The functions of one structure, and what they were made for."""

    task: Task
    steps: Steps
    train: Callable
    evaluate: Callable
    predict: Callable

    def compilations(self) -> int:
        """How often XLA compiled the training step."""
        return compilations(self.train)


def compile_structure(config: cfg.Config, description: dict[str, Any]) -> Compiled:
    """The jitted functions that serve every config of the same structure.

    Args:
        config: Any of them.
        description: Of the data, as `train.setup.describe` gives it, with `preprocessing`.
    """
    task = setup.make_task(config, description, setup.load_weights(config))
    steps = make_steps(config, task)
    return Compiled(
        task,
        steps,
        jax.jit(steps.train, donate_argnums=0),
        jax.jit(steps.evaluate),
        jax.jit(steps.predict),
    )


def run_cell(
    config: cfg.Config, compiled: Compiled, train: Arrays, evaluation: Arrays
) -> dict[str, Any]:
    """Train one cell from its start to its end.

    Args:
        config: The cell's config, its seed included.
        compiled: Of its structure.
        train, evaluation: The decoded splits.

    Returns:
        The cell's result as JSON: `status` (`done`, or `failed` with `reason`), `metrics` of both
        splits in inference, `curves`, `correct` (which evaluation examples were classified
        correctly, as packed bits in hexadecimal), `seconds`, `parameters`, `steps`.
    """
    began = time.perf_counter()
    task, values = compiled.task, values_of(config)
    batches = DeviceBatches(train, batch=config.data.batch, seed=config.seed)
    # The training split is evaluated, too: its gap to the evaluation split is the result.
    size = config.data.eval_batch or config.data.batch
    splits = {
        'train': DeviceBatches(train, batch=size),
        'eval': DeviceBatches(evaluation, batch=size),
    }
    state, curves, losses = compiled.steps.init(config.seed), [], []
    for step, batch in zip(range(1, task.ends[-1] + 1), batches.train(0)):
        state, sums = compiled.train(state, batch, values)
        losses.append((sums['objective'], sums['loss'], sums['count'], sums['confusion']))
        if task.due(step):
            if not all(np.isfinite(objective) for objective, *_ in losses):
                return {'status': 'failed', 'reason': f'the loss is not finite by step {step}'}
            epoch = round(step / task.steps_per_epoch, 6)
            curves.append({'step': step, 'epoch': epoch, 'split': 'train', **_mean(losses)})
            result = _evaluate(compiled, state, splits['eval'], values)
            curves.append({'step': step, 'epoch': epoch, 'split': 'eval', **result})
            losses = []
    return {
        'status': 'done',
        'metrics': {
            name: _evaluate(compiled, state, split, values) for name, split in splits.items()
        },
        'curves': curves,
        'correct': _correct(compiled, state, splits['eval'], values),
        'seconds': time.perf_counter() - began,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        'steps': task.ends[-1],
    }


def _mean(losses: list) -> dict[str, float]:
    """Training loss and accuracy over some steps, with regularization on."""
    count = sum(int(n) for _, _, n, _ in losses)
    return {
        'loss': sum(float(loss) for _, loss, _, _ in losses) / count,
        'accuracy': sum(int(np.trace(confusion)) for *_, confusion in losses) / count,
    }


def _evaluate(compiled: Compiled, state: State, batches: DeviceBatches, values) -> dict[str, Any]:
    sums = sum_metrics(compiled.evaluate, state, batches.evaluate(), values)
    result = metrics.result(sums)
    return {**metrics.scalars(result), 'count': result['count']}


def _correct(compiled: Compiled, state: State, batches: DeviceBatches, values) -> str:
    bits = []
    for batch in batches.evaluate():
        predicted = np.argmax(compiled.predict(state, batch['image'], values), axis=-1)
        right = predicted == np.asarray(batch['label'])
        bits.append(right[np.asarray(batch['mask'])])
    return np.packbits(np.concatenate(bits)).tobytes().hex()
