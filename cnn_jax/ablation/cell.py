"""Training cells of one structure from their start to their end, alone or together."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import config as cfg
from cnn_jax.ablation.compiled import Compiled, Phase
from cnn_jax.data.batches import with_order
from cnn_jax.params import flatten
from cnn_jax.train import early_stopping, metrics, precise_norm, setup
from cnn_jax.train.early_stopping import Best
from cnn_jax.train.loop import sum_metrics
from cnn_jax.train.state import State
from cnn_jax.train.step import values_of

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
        `steps` (done, also those after the best where there is `train.patience`).
    """
    began = time.perf_counter()
    runs = _Runs(configs, compiled, train, evaluation)
    state = runs.train()
    if runs.all_failed():
        return [runs.failure(i) for i in range(len(configs))]
    best = configs[0].train.patience  # not that of the last report
    evaluated = runs.evaluate(-1, state, 'eval') if best else runs.evaluated
    final = {'train': runs.evaluate(-1, state, 'train'), 'eval': evaluated}
    for i, found in enumerate(evaluated[: len(configs)]):
        if not np.isfinite(found['loss']):
            runs.failures.setdefault(i, 'the loss on the evaluation split is not finite')
    correct = runs.correct(state)
    seconds = (time.perf_counter() - began) / len(configs)
    return [
        runs.failure(i)
        if i in runs.failures
        else {
            'status': 'done',
            'metrics': {split: found[i] for split, found in final.items()},
            'curves': runs.curves[i],
            'correct': np.packbits(correct[i]).tobytes().hex(),
            'seconds': seconds,
            'parameters': runs.parameters,
            'steps': runs.steps(i),
        }
        for i in range(len(configs))
    ]


class _Runs:
    """Cells in training: their values and data, and what was measured of each so far."""

    def __init__(self, configs: Sequence[cfg.Config], compiled: Compiled, train, evaluation):
        # A program that is not full repeats a cell; the repetitions' results are dropped.
        configs = [*configs, *[configs[-1]] * (compiled.together - len(configs))]
        self._compiled, self._config = compiled, configs[0]
        self._values = compiled.stack([values_of(config) for config in configs])
        states = [compiled.phases[0].steps.init(config.seed) for config in configs]
        self._data = [
            _Data(configs, compiled, phase, states, train, evaluation) for phase in compiled.phases
        ]
        self._start = compiled.stack(states)
        self.parameters = sum(leaf.size for leaf in flatten(states[0].params).values())
        self.curves: list[list[Result]] = [[] for _ in configs]
        self.evaluated: list[Result] = []  # of the latest report; the last step has one
        self.failures: dict[int, str] = {}
        self._best = [Best() for _ in configs]
        self._over: dict[int, int] = {}  # the step at which a cell ran out of patience

    def train(self) -> State:
        """Train all phases, or until no cell goes on; the last state, or with patience the best."""
        task, state, pending, config = self._compiled.task, self._start, [], self._config.train
        best = jax.tree.map(jnp.copy, state) if config.patience else None
        for number, phase in enumerate(self._compiled.phases):
            state = phase.enter(state) if number else state
            start, end = (0, *task.ends)[number], task.ends[number]
            for step, batch in self._data[number].train(start, end):
                state, sums = phase.train(state, batch, self._values)
                pending.append(sums)
                if task.due(step, config.eval_every):
                    if config.precise_norm:
                        state = self._with_precise_norm(number, state)
                    self.evaluated = self.evaluate(number, state, 'eval')
                    self._report(step, pending)
                    pending = []
                    if best:
                        best = self._better(step, state, best)
                    if self._none_goes_on():
                        return best or state
        return best or state

    def _with_precise_norm(self, number: int, state: State) -> State:
        """The state with batch statistics of the evaluated weights, as `loop.fit` takes them."""
        estimate, stack = self._compiled.phases[number].estimate, self._compiled.stack

        def of_all(state: State, batch, n: int, values):
            return estimate(state, batch, stack([np.int32(n)] * self._compiled.together), values)

        taken = self._data[number].train(0, self._config.train.precise_norm)
        return precise_norm.renewed(of_all, state, (batch for _, batch in taken), self._values)

    def _better(self, step: int, state: State, best: State) -> State:
        """Each cell's best state so far, after an evaluation; notes which cells are over."""
        flags = []
        for i, found in enumerate(self.evaluated):
            score = early_stopping.score_of(self._config, found)
            self._best[i] = self._best[i].after(step, score)
            flags.append(np.bool_(i not in self._over and score >= self._best[i].score))
            per_epoch = self._compiled.task.steps_per_epoch
            if early_stopping.is_over(self._config, self._best[i], step, per_epoch):
                self._over.setdefault(i, step)
        return self._compiled.choose(self._compiled.stack(flags), state, best)

    def _none_goes_on(self) -> bool:
        return len(self.failures | self._over) == len(self.curves)

    def steps(self, i: int) -> int:
        """How many steps a cell trained."""
        return self._over.get(i, self._compiled.task.ends[-1])

    def _report(self, step: int, pending: list) -> None:
        """Add a point to each curve: training since the last one, and evaluation now."""
        place = {'step': step, 'epoch': round(step / self._compiled.task.steps_per_epoch, 6)}
        for i, sums in enumerate(zip(*map(self._compiled.split, pending))):
            if i in self._over:
                continue
            self.curves[i].append({**place, 'split': 'train', **_mean(sums)})
            self.curves[i].append({**place, 'split': 'eval', **self.evaluated[i]})
            numbers = [each[name] for each in sums for name in ('objective', 'gradient_norm')]
            if not np.isfinite(numbers).all():
                self.failures.setdefault(i, f'the loss is not finite by step {step}')

    def all_failed(self) -> bool:
        """Whether no cell is left to train."""
        return len(self.failures) == len(self.curves)

    def failure(self, i: int) -> Result:
        """The result of a cell that failed."""
        return {'status': 'failed', 'reason': self.failures[i]}

    def evaluate(self, number: int, state: State, split: str) -> list[Result]:
        """Each cell's metrics in inference, by the functions of phase `number`."""
        batches = self._data[number].evaluate(split)
        sums = sum_metrics(self._compiled.phases[number].evaluate, state, batches, self._values)
        results = map(metrics.result, self._compiled.split(sums))
        return [{**metrics.scalars(result), 'count': result['count']} for result in results]

    def correct(self, state: State) -> list[np.ndarray]:
        """Whether each evaluation example is classified correctly, for each cell."""
        predict, split, parts = self._compiled.phases[-1].predict, self._compiled.split, []
        for batch in self._data[-1].evaluate('eval'):
            log_probs = split(predict(state, batch['image'], self._values))
            facts = split({name: batch[name] for name in ('label', 'mask')})
            parts.append(
                [
                    (np.argmax(output, axis=-1) == fact['label'])[fact['mask']]
                    for output, fact in zip(log_probs, facts)
                ]
            )
        return [np.concatenate(of_cell) for of_cell in zip(*parts)]


class _Data:
    """What the cells see in one phase: images, or features of their frozen backbones."""

    def __init__(self, configs, compiled: Compiled, phase: Phase, states, train, evaluation):
        self._stack = compiled.stack
        self._runs = []
        for config, state in zip(configs, states):
            size = config.data.eval_batch or config.data.batch
            splits = (
                with_order(train, batch=config.data.batch, seed=config.seed),
                # Evaluated, too: its gap to the evaluation split is part of the result.
                with_order(train, batch=size),
                with_order(evaluation, batch=size),
            )
            if phase.steps.cached:
                task, description = compiled.task, compiled.description
                splits = setup.features(config, description, task, state, *splits)
            self._runs.append(dict(zip(('training', 'train', 'eval'), splits)))

    def train(self, start: int, end: int) -> Iterator[tuple[int, Any]]:
        """The numbers of the steps after `start` up to `end`, and their batches."""
        batches = zip(*(run['training'].train(start) for run in self._runs))
        return zip(range(start + 1, end + 1), map(self._stack, batches))

    def evaluate(self, split: str) -> Iterator[Any]:
        """The examples of a split, `train` or `eval`, once and not augmented."""
        return map(self._stack, zip(*(run[split].evaluate() for run in self._runs)))


def _mean(steps: Sequence[metrics.Sums]) -> dict[str, float]:
    """Training loss and accuracy over some steps, with regularization on."""
    count = sum(int(sums['count']) for sums in steps)
    return {
        'loss': sum(float(sums['loss']) for sums in steps) / count,
        'accuracy': sum(int(np.trace(sums['confusion'])) for sums in steps) / count,
    }
