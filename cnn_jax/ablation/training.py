"""Training runs of one structure from their start to their end, alone or several together.

Together, each function of a run is mapped over a leading axis, and devices share that axis. The
steps are those of `train.loop.steps`.
"""

import collections
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from cnn_jax import config as cfg
from cnn_jax.components import NO_COMPONENTS, Components
from cnn_jax.data.batches import with_order
from cnn_jax.params import flatten
from cnn_jax.train import metrics, setup, step
from cnn_jax.train.loop import Phase, phase_at, steps, with_eval_statistics
from cnn_jax.train.metrics import EarlyStopping
from cnn_jax.train.program import RunSpec, State, begin_phase, state_maker, traced_values

Result = dict[str, Any]

# The sums of a step that a curve is drawn from; [K, K] confusions would fill the memory.
KEPT = ('count', 'loss', 'bin_correct', 'objective', 'gradient_norm')


@dataclass(frozen=True)
class Compiled:
    """The functions of one structure, and what they were made for.

    They train `together` runs; over 1, states, batches, values and results have a leading axis of
    that length.
    """

    spec: RunSpec
    description: dict[str, Any]
    together: int
    phases: list[Phase]  # without batches
    init: Callable[[int], State]  # from a seed to a run's state before its first step
    stack: Callable[[Sequence[Any]], Any]  # from one tree a run to what the functions take
    choose: Callable[[Any, State, State], State]  # (flags, new, old): one flag a run

    def split(self, results: Any) -> list[Any]:
        """From what the functions return to one tree of arrays on the host a run."""
        results = jax.device_get(results)
        if self.together == 1:
            return [results]
        leaves, tree = jax.tree.flatten(results)
        return [
            jax.tree.unflatten(tree, [leaf[i] for leaf in leaves]) for i in range(self.together)
        ]


def compile_structure(
    config: cfg.Config,
    data: setup.Data,
    together: int = 1,
    components: Components = NO_COMPONENTS,
) -> Compiled:
    """The jitted functions that serve every config of the same structure.

    One call trains `together` runs; over 1, as many more as make a multiple of the devices.
    """
    devices = jax.devices()
    if together > 1:
        together = math.ceil(together / len(devices)) * len(devices)
    spec = setup.make_spec(config, data.description, data.weights, components)
    mesh = jax.make_mesh((len(devices),), ('run',), (AxisType.Auto,), devices=devices)
    runs = PartitionSpec('run')

    def over_runs(function: Callable) -> Callable:
        return jax.shard_map(function, mesh=mesh, in_specs=runs, out_specs=runs, check_vma=False)

    def jitted(function: Callable, **options) -> Callable:
        return jax.jit(over_runs(jax.vmap(function)) if together > 1 else function, **options)

    def stack(trees: Sequence[Any]) -> Any:
        # Through `over_runs`, so that what is stacked is laid out as what the functions return.
        return over_runs(lambda tree: tree)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))

    stacked = jax.jit(stack) if together > 1 else lambda trees: trees[0]
    programs = setup.make_programs(config, spec)

    def phase(program: Any, end: int) -> Phase:
        def bound(function: Callable) -> Callable:
            return functools.partial(function, program)

        estimate = jitted(bound(step.estimate_step))
        return Phase(
            program,
            end,
            begin=jitted(bound(begin_phase)),
            train_step=jitted(bound(step.train_step), donate_argnums=0),
            eval_step=jitted(bound(step.eval_step)),
            estimate=lambda state, batch, count, values: estimate(
                state, batch, stacked([count] * together), values
            ),
            predict=jitted(bound(step.predict_step)),
        )

    return Compiled(
        spec,
        data.description,
        together,
        [phase(program, end) for program, end in zip(programs, spec.phase_ends)],
        state_maker(programs[0]),
        stacked,
        jitted(_chosen),
    )


def _chosen(flag: Array, new: State, old: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def train_runs(configs: Sequence[cfg.Config], compiled: Compiled, data: setup.Data) -> list[Result]:
    """Train some runs.

    A run alone gives the same bits whatever was trained before it. Runs together agree with it
    to the rounding of float32, which training amplifies: their sums are taken in another order.

    Args:
        configs: The runs' configs, their seeds included; at most `compiled.together`.
        compiled, data: The functions of their structure, and the opened data.

    Returns:
        The results as JSON: `status` (`done`, or `failed` with `reason`), `metrics` of both splits
        in inference, `curves`, `correct` (a bit for each evaluation example, packed, in
        hexadecimal), `seconds` (the run's share), `parameters`, `steps`.
    """
    began = time.perf_counter()
    runs = _Runs(configs, compiled, data)
    state = runs.train()
    if runs.all_failed():
        return [runs.failure(i) for i in range(len(configs))]
    best = configs[0].train.patience  # not the state of the last report
    evaluated = runs.evaluate(-1, state, 'eval') if best else runs.evaluated
    final = {'train': runs.evaluate(-1, state, 'train'), 'eval': evaluated}
    for i, result in enumerate(evaluated[: len(configs)]):
        if not np.isfinite(result['loss']):
            runs.failures.setdefault(i, 'the loss on the evaluation split is not finite')
    correct = runs.correct(state)
    seconds = (time.perf_counter() - began) / len(configs)
    return [
        runs.failure(i)
        if i in runs.failures
        else {
            'status': 'done',
            'metrics': {split: results[i] for split, results in final.items()},
            'curves': runs.curves[i],
            'correct': np.packbits(correct[i]).tobytes().hex(),
            'seconds': seconds,
            'parameters': runs.parameters,
            'steps': runs.steps_done(i),
        }
        for i in range(len(configs))
    ]


class _Runs:
    """Runs in training: their values and data, and what was measured of each so far."""

    def __init__(self, configs: Sequence[cfg.Config], compiled: Compiled, data: setup.Data):
        # A program that is not full repeats a run; the repetitions' results are dropped.
        configs = [*configs, *[configs[-1]] * (compiled.together - len(configs))]
        self._compiled, self._config = compiled, configs[0]
        self._values = compiled.stack([traced_values(config) for config in configs])
        states = [compiled.init(config.seed) for config in configs]
        self._phases = [
            replace(phase, train=_Stacked(configs, compiled, phase, states, data))
            for phase in compiled.phases
        ]
        self._start = compiled.stack(states)
        self.parameters = sum(leaf.size for leaf in flatten(states[0].params).values())
        self.curves: list[list[Result]] = [[] for _ in configs]
        self.evaluated: list[Result] = []  # of the latest report; the last step has one
        self.failures: dict[int, str] = {}
        self._best = [EarlyStopping() for _ in configs]
        self._over: dict[int, int] = {}  # the step at which a run ran out of patience

    def train(self) -> State:
        """Train to the end, or until no run goes on; the last state, or with patience the best."""
        state, config = self._start, self._config.train
        waiting: collections.deque[metrics.Sums] = collections.deque()
        total = None
        best = jax.tree.map(jnp.copy, state) if config.patience else None
        for number, phase, _, state, sums in steps(self._phases, self._start, 0, self._values):
            reports = self._compiled.spec.is_boundary(number, config.eval_every)
            waiting.append({name: sums[name] for name in KEPT})
            while len(waiting) > (0 if reports else 2):  # behind the device, so it need not wait
                total = metrics.add(total, waiting.popleft())
            if not reports:
                continue
            state = with_eval_statistics(self._config, phase, state, self._values)
            self.evaluated = self.evaluate(phase_at(self._phases, number), state, 'eval')
            self._report(number, total)
            total = None
            if best is not None:
                best = self._better(number, state, best)
            if len(self.failures | self._over) == len(self.curves):
                break
        return state if best is None else best

    def _better(self, number: int, state: State, best: State) -> State:
        """Each run's best state so far, after an evaluation; notes which runs are over."""
        flags = []
        for i, result in enumerate(self.evaluated):
            score = metrics.score_of(self._config, result)
            self._best[i] = self._best[i].after(number, score)
            flags.append(np.bool_(i not in self._over and score >= self._best[i].score))
            if self._best[i].is_over(self._config, number, self._compiled.spec.steps_per_epoch):
                self._over.setdefault(i, number)
        return self._compiled.choose(self._compiled.stack(flags), state, best)

    def steps_done(self, i: int) -> int:
        """The number of steps that a run trained."""
        return self._over.get(i, self._compiled.spec.phase_ends[-1])

    def _report(self, number: int, total: Any) -> None:
        """Add a point to each curve: training since the last one, and evaluation now."""
        epoch = round(number / self._compiled.spec.steps_per_epoch, 6)
        for i, sums in enumerate(self._compiled.split(total)):
            if i in self._over:
                continue
            count = int(sums['count'])
            means = {  # with regularization on
                'loss': float(sums['loss']) / count,
                'accuracy': float(sums['bin_correct'].sum()) / count,
            }
            point = {'step': number, 'epoch': epoch}
            self.curves[i].append({**point, 'split': 'train', **means})
            self.curves[i].append({**point, 'split': 'eval', **self.evaluated[i]})
            # One step that is not finite leaves a sum that is not.
            if not np.isfinite([sums['objective'], sums['gradient_norm']]).all():
                self.failures.setdefault(i, f'the loss is not finite by step {number}')

    def all_failed(self) -> bool:
        """Return whether no run is left to train."""
        return len(self.failures) == len(self.curves)

    def failure(self, i: int) -> Result:
        """The result of a run that failed."""
        return {'status': 'failed', 'reason': self.failures[i]}

    def evaluate(self, number: int, state: State, split: str) -> list[Result]:
        """Each run's metrics in inference, by the functions of phase `number`."""
        phase = self._phases[number]
        sums = metrics.sum_over(
            lambda batch: phase.eval_step(state, batch, self._values), phase.train.split(split)
        )
        results = map(metrics.result, self._compiled.split(sums))
        return [{**metrics.scalars(result), 'count': result['count']} for result in results]

    def correct(self, state: State) -> list[np.ndarray]:
        """For each run, a mask of the evaluation examples that are classified correctly."""
        phase, split, parts = self._phases[-1], self._compiled.split, []
        for batch in phase.train.split('eval'):
            log_probs = split(phase.predict(state, batch['image'], self._values))
            facts = split({name: batch[name] for name in ('label', 'mask')})
            parts.append(
                [
                    (np.argmax(output, axis=-1) == fact['label'])[fact['mask']]
                    for output, fact in zip(log_probs, facts)
                ]
            )
        return [np.concatenate(of_run) for of_run in zip(*parts)]


class _Stacked:
    """The batches of the runs in one phase: images, or features of their frozen backbones."""

    def __init__(self, configs, compiled: Compiled, phase: Phase, states, data: setup.Data):
        self._stack = compiled.stack
        self._runs = []
        for config, state in zip(configs, states):
            size = config.data.eval_batch or config.data.batch
            splits = (
                with_order(data.train, batch=config.data.batch, seed=config.seed),
                # Evaluated, too: its gap to the evaluation split is part of the result.
                with_order(data.train, batch=size),
                with_order(data.evaluate, batch=size),
            )
            if phase.program.cached:
                spec, description = compiled.spec, compiled.description
                splits = setup.features(config, description, spec, state, *splits)
            self._runs.append(dict(zip(('training', 'train', 'eval'), splits)))

    def train(self, start: int) -> Iterator[Any]:
        """The training batches from step `start` on."""
        return map(self._stack, zip(*(run['training'].train(start) for run in self._runs)))

    def split(self, name: str) -> Iterator[Any]:
        """The examples of a split, `train` or `eval`, once and not augmented."""
        return map(self._stack, zip(*(run[name].evaluate() for run in self._runs)))
