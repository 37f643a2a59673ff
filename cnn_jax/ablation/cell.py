"""Training cells of one structure from their start to their end, alone or together."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cnn_jax import config as cfg
from cnn_jax.ablation.compiled import Compiled, Phase
from cnn_jax.data.batches import reordered
from cnn_jax.params import flatten
from cnn_jax.train import metrics, setup
from cnn_jax.train.loop import sum_metrics
from cnn_jax.train.step import State, values_of

Result = dict[str, Any]


def train_cells(
    configs: Sequence[cfg.Config], compiled: Compiled, train, evaluation
) -> list[Result]:
    """Train some cells.

    A cell alone gives the same bits whatever was trained before it. Cells together agree with it
    to the rounding of float32, which training amplifies: their sums are taken in another order.

    Args:
        configs: The cells' configs, their seeds included; at most `compiled.together`.
        compiled: Of their structure.
        train, evaluation: The opened batches of both splits.

    Returns:
        The cells' results as JSON: `status` (`done`, or `failed` with `reason`), `metrics` of both
        splits in inference, `curves`, `correct` (which evaluation examples were classified
        correctly, as packed bits in hexadecimal), `seconds` (the cell's share), `parameters`,
        `steps`.
    """
    began, task = time.perf_counter(), compiled.task
    # What is missing to a full program is filled with repetitions, whose results are dropped.
    wanted = len(configs)
    configs = [*configs, *[configs[-1]] * (compiled.together - wanted)]
    values = compiled.stack([values_of(config) for config in configs])
    states = [compiled.phases[0].steps.init(config.seed) for config in configs]
    parameters = sum(leaf.size for leaf in flatten(states[0].params).values())
    data = [_Data(configs, compiled, phase, states, train, evaluation) for phase in compiled.phases]
    state = compiled.stack(states)
    curves, failures, pending = [[] for _ in configs], {}, []

    for phase, of_phase, start, end in zip(compiled.phases, data, (0, *task.ends), task.ends):
        state = phase.enter(state) if start else state
        for step, batch in of_phase.train(start, end):
            state, sums = phase.train(state, batch, values)
            pending.append(sums)
            if not task.due(step, configs[0].train.eval_every):
                continue
            place = {'step': step, 'epoch': round(step / task.steps_per_epoch, 6)}
            trained, pending = [compiled.split(sums) for sums in pending], []
            evaluated = _evaluate(compiled, phase, state, of_phase.eval(), values)
            for i, curve in enumerate(curves):
                steps = [sums[i] for sums in trained]
                curve.append({**place, 'split': 'train', **_mean(steps)})
                curve.append({**place, 'split': 'eval', **evaluated[i]})
                if not np.isfinite([sums['objective'] for sums in steps]).all():
                    failures.setdefault(i, f'the loss is not finite by step {step}')
            if len(failures) == len(configs):
                return [{'status': 'failed', 'reason': failures[i]} for i in range(wanted)]

    phase, of_phase = compiled.phases[-1], data[-1]
    final = {
        split: _evaluate(compiled, phase, state, batches(), values)
        for split, batches in (('train', of_phase.train_in_inference), ('eval', of_phase.eval))
    }
    correct = _correct(compiled, phase, state, of_phase.eval(), values)
    seconds = (time.perf_counter() - began) / wanted
    return [
        {'status': 'failed', 'reason': failures[i]}
        if i in failures
        else {
            'status': 'done',
            'metrics': {split: found[i] for split, found in final.items()},
            'curves': curves[i],
            'correct': np.packbits(correct[i]).tobytes().hex(),
            'seconds': seconds,
            'parameters': parameters,
            'steps': task.ends[-1],
        }
        for i in range(wanted)
    ]


class _Data:
    """What the cells see in one phase: images, or features of their frozen backbones."""

    def __init__(self, configs, compiled: Compiled, phase: Phase, states, train, evaluation):
        self._stack = compiled.stack
        self._runs = []
        for config, state in zip(configs, states):
            size = config.data.eval_batch or config.data.batch
            splits = (
                reordered(train, batch=config.data.batch, seed=config.seed),
                # Evaluated, too: its gap to the evaluation split is part of the result.
                reordered(train, batch=size),
                reordered(evaluation, batch=size),
            )
            if phase.steps.cached:
                splits = setup.features(config, compiled.description, compiled.task, state, *splits)
            self._runs.append(splits)

    def train(self, start: int, end: int) -> Iterator[tuple[int, Any]]:
        """The numbers of the steps after `start` up to `end`, and their batches."""
        batches = zip(*(train.train(start) for train, _, _ in self._runs))
        return zip(range(start + 1, end + 1), map(self._stack, batches))

    def train_in_inference(self) -> Iterator[Any]:
        """The training examples once, not augmented."""
        return map(self._stack, zip(*(train.evaluate() for _, train, _ in self._runs)))

    def eval(self) -> Iterator[Any]:
        """The evaluation examples once."""
        return map(self._stack, zip(*(split.evaluate() for _, _, split in self._runs)))


def _mean(steps: list[metrics.Sums]) -> dict[str, float]:
    """Training loss and accuracy over some steps, with regularization on."""
    count = sum(int(sums['count']) for sums in steps)
    return {
        'loss': sum(float(sums['loss']) for sums in steps) / count,
        'accuracy': sum(int(np.trace(sums['confusion'])) for sums in steps) / count,
    }


def _evaluate(compiled: Compiled, phase: Phase, state: State, batches, values) -> list[Result]:
    sums = sum_metrics(phase.evaluate, state, batches, values)
    results = map(metrics.result, compiled.split(sums))
    return [{**metrics.scalars(result), 'count': result['count']} for result in results]


def _correct(compiled: Compiled, phase: Phase, state: State, batches, values) -> list[np.ndarray]:
    """Whether each example is classified correctly, for each run."""
    parts = []
    for batch in batches:
        log_probs = compiled.split(phase.predict(state, batch['image'], values))
        facts = compiled.split({name: batch[name] for name in ('label', 'mask')})
        parts.append(
            [
                (np.argmax(output, axis=-1) == fact['label'])[fact['mask']]
                for output, fact in zip(log_probs, facts)
            ]
        )
    return [np.concatenate(of_run) for of_run in zip(*parts)]
