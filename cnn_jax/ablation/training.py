"""Training runs of one structure from their start to their end, alone or several together.

Together, each function of a run is mapped over a leading axis, and devices share that axis. The
steps are those of `train.loop.steps`.
"""

import collections
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from cnn_jax import config as cfg
from cnn_jax import rng
from cnn_jax.components import NO_COMPONENTS, Components
from cnn_jax.data.batches import Batch, with_order
from cnn_jax.params import flatten
from cnn_jax.regularizers import cross_entropy
from cnn_jax.train import metrics, setup, step
from cnn_jax.train.loop import Phase, phase_at, steps, with_eval_statistics
from cnn_jax.train.metrics import EarlyStopping
from cnn_jax.train.program import (
    Program,
    RunSpec,
    State,
    Values,
    begin_phase,
    state_maker,
    traced_values,
)

Result = dict[str, Any]

# The sums of a step that are kept.
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
    look: Callable[[State, Batch, Values], dict[str, Array]]  # `_look`

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
    data = setup.for_arm(config, data)
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
            eval_step=jitted(bound(_judge)),
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
        jitted(functools.partial(_look, programs[-1])),
    )


def _chosen(flag: Array, new: State, old: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def _look(program: Program, state: State, batch: Batch, values: Values) -> dict[str, Array]:
    """The checks that a state tells of itself: ‖w‖₂ of all kernels, and the share dropped.

    The latter is that of the activations other than 0 that modules called `Dropout` set to 0 in a
    training pass over a batch; 0 if there are none.
    """
    kernels = [leaf for path, leaf in flatten(state.params).items() if path.endswith('kernel')]
    some: list[Array] = []
    dropped: list[Array] = []

    def watch(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if type(context.module).__name__ == 'Dropout':
            x = args[0] if args else kwargs['x']
            some.append(jnp.sum(x != 0))
            dropped.append(jnp.sum((x != 0) & (y == 0)))
        return y

    config = step.bound_config(program, state, values)
    images = batch['image'] if program.cached else program.spec.prepare(batch['image'])
    with nn.intercept_methods(watch):
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        program.forward(config, variables, images, rng.key(config.seed, 'dropout', state.step))
    return {
        'weight_norm': jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in kernels)),
        'dropped': jnp.asarray(sum(dropped) / jnp.maximum(sum(some), 1), jnp.float32),
    }


def _judge(program: Program, state: State, batch: Batch, values: Values) -> metrics.Sums:
    """The sums of a batch in inference, and of each image its loss and whether it is right."""
    log_probs = step.predict_step(program, state, batch['image'], values)
    losses, labels = cross_entropy(log_probs, batch['label']), batch['label']
    sums = metrics.batch_sums(log_probs, losses, labels, batch['mask'])
    right = jnp.argmax(log_probs, axis=-1) == labels
    return sums | {'image_loss': losses, 'image_right': right, 'mask': batch['mask']}


def train_runs(
    configs: Sequence[cfg.Config],
    compiled: Compiled,
    data: setup.Data,
    *,
    trial: bool = False,
    curves: bool = True,
) -> list[Result]:
    """Train some runs and judge them, once, at their end.

    A run alone gives the same bits whatever was trained before it. Runs together agree with it
    to the rounding of float32, which training amplifies: their sums are taken in another order.

    Args:
        configs: The runs' configs, their seeds included; at most `compiled.together`.
        compiled, data: The functions of their structure, and the opened data, with the test split.
        trial: Judge on the held-out images, and on nothing else.
        curves: Whether to evaluate while training, too, every `train.eval_every` epochs.

    Returns:
        The results as JSON: `status` (`done`, or `failed` with `reason`), `metrics` by split,
        `train`, `validation` (where images are held out) and `test`, in inference; `curves`;
        `correct` (a bit for each test image, packed, in hexadecimal) and `losses` (float16 in
        hexadecimal); `checks` of what the regularizers did: `weight_norm` and `dropped` at the
        end, `gradient_norm` and `training_loss` over the last tenth of the steps; `seconds` (the
        run's share), `parameters`, `steps`.
    """
    began = time.perf_counter()
    runs = _Runs(configs, compiled, data, curves)
    state = runs.train()
    if runs.all_failed():
        return [runs.failure(i) for i in range(len(configs))]
    splits = ['validation'] if data.held_out else []
    splits = splits if trial else ['train', *splits, 'test']
    judged = {split: runs.judge(-1, state, split) for split in splits}
    checks = [] if trial else runs.checks(state)
    for i, split in itertools.product(range(len(configs)), splits):
        if not np.isfinite(judged[split][i].metrics['loss']):
            runs.failures.setdefault(i, f'the {split} loss is not finite')
    seconds = (time.perf_counter() - began) / len(configs)

    def result(i: int) -> Result:
        if i in runs.failures:
            return runs.failure(i)
        found = {split: each[i].metrics for split, each in judged.items()}
        facts = {
            'status': 'done',
            'metrics': found,
            'seconds': seconds,
            'parameters': runs.parameters,
            'steps': runs.steps_done(i),
        }
        if trial:
            return facts
        tested = judged['test'][i]
        return facts | {
            'curves': runs.curves[i],
            'checks': checks[i],
            'correct': np.packbits(tested.right).tobytes().hex(),
            'losses': np.minimum(tested.losses, 6e4).astype('<f2').tobytes().hex(),
        }

    return [result(i) for i in range(len(configs))]


class Judgement(NamedTuple):
    """A run on a split: its metrics, and of each image whether it is right and its loss."""

    metrics: Result
    right: np.ndarray
    losses: np.ndarray


class _Runs:
    """Runs in training: their values and data, and what was measured of each so far."""

    def __init__(
        self, configs: Sequence[cfg.Config], compiled: Compiled, data: setup.Data, curves: bool
    ):
        # A program that is not full repeats a run; the repetitions' results are dropped.
        configs = [*configs, *[configs[-1]] * (compiled.together - len(configs))]
        self._compiled, self._config = compiled, configs[0]
        self._values = compiled.stack([traced_values(config) for config in configs])
        dealt = [setup.deal(config, data) for config in configs]
        facts = compiled.description, compiled.spec
        states = [
            setup.with_scale(config, *facts, compiled.init(config.seed), own.train)
            for config, own in zip(configs, dealt)
        ]
        self._phases = [
            replace(phase, train=_Stacked(configs, compiled, phase, states, dealt))
            for phase in compiled.phases
        ]
        self._start = compiled.stack(states)
        self._curves = curves
        self.parameters = sum(leaf.size for leaf in flatten(states[0].params).values())
        self.curves: list[list[Result]] = [[] for _ in configs]
        self.failures: dict[int, str] = {}
        self._latest: collections.deque[metrics.Sums] = collections.deque(
            maxlen=math.ceil(compiled.spec.phase_ends[-1] / 10)
        )
        self._best = [EarlyStopping() for _ in configs]
        self._over: dict[int, int] = {}  # the step at which a run ran out of patience
        self._tails: dict[int, list[metrics.Sums]] = {}  # its latest sums then

    def train(self) -> State:
        """Train to the end, or until no run goes on; the last state, or with patience the best."""
        state, config = self._start, self._config.train
        every = config.eval_every if self._curves or config.patience else 0.0
        waiting: collections.deque[metrics.Sums] = collections.deque()
        total = None
        best = jax.tree.map(jnp.copy, state) if config.patience else None
        for number, phase, _, state, sums in steps(self._phases, self._start, 0, self._values):
            reports = self._compiled.spec.is_boundary(number, every)
            waiting.append({name: sums[name] for name in KEPT})
            while len(waiting) > (0 if reports else 2):  # behind the device, so it need not wait
                self._latest.append(jax.device_get(waiting.popleft()))
                total = metrics.add(total, self._latest[-1])
            if not reports:
                continue
            state = with_eval_statistics(self._config, phase, state, self._values)
            evaluated = []
            if every:
                evaluated = self.judge(phase_at(self._phases, number), state, 'validation')
            self._report(number, total, evaluated)
            total = None
            if best is not None:
                best = self._better(number, state, best, evaluated)
            if len(self.failures | self._over) == len(self.curves):
                break
        return state if best is None else best

    def _better(self, number: int, state: State, best: State, evaluated: list[Judgement]) -> State:
        """Each run's best state so far, after an evaluation; notes which runs are over."""
        flags = []
        for i, result in enumerate(evaluated):
            score = metrics.score_of(self._config, result.metrics)
            self._best[i] = self._best[i].after(number, score)
            flags.append(np.bool_(i not in self._over and score >= self._best[i].score))
            over = self._best[i].is_over(self._config, number, self._compiled.spec.steps_per_epoch)
            if over and i not in self._over:
                self._over[i] = number
                self._tails[i] = [self._compiled.split(sums)[i] for sums in self._latest]
        return self._compiled.choose(self._compiled.stack(flags), state, best)

    def steps_done(self, i: int) -> int:
        """The number of steps that a run trained."""
        return self._over.get(i, self._compiled.spec.phase_ends[-1])

    def _report(self, number: int, total: Any, evaluated: list[Judgement]) -> None:
        """Look for failures, and add a point to each curve: training since the last, and now."""
        epoch = round(number / self._compiled.spec.steps_per_epoch, 6)
        for i, sums in enumerate(self._compiled.split(total)):
            if i in self._over:  # what it does beyond its end is not kept
                continue
            # One step that is not finite leaves a sum that is not.
            if not np.isfinite([sums['objective'], sums['gradient_norm']]).all():
                self.failures.setdefault(i, f'the loss is not finite by step {number}')
            if not evaluated:
                continue
            count = int(sums['count'])
            means = {  # with regularization on
                'loss': float(sums['loss']) / count,
                'accuracy': float(sums['bin_correct'].sum()) / count,
            }
            point = {'step': number, 'epoch': epoch}
            self.curves[i].append({**point, 'split': 'train', **means})
            self.curves[i].append({**point, 'split': 'eval', **evaluated[i].metrics})

    def all_failed(self) -> bool:
        """Return whether no run is left to train."""
        return len(self.failures) == len(self.curves)

    def failure(self, i: int) -> Result:
        """The result of a run that failed."""
        return {'status': 'failed', 'reason': self.failures[i]}

    def checks(self, state: State) -> list[dict[str, float]]:
        """The checks of each run: whether its regularizers did something."""
        batch = next(self._phases[-1].train.train(self._compiled.spec.phase_ends[-1]))
        found = self._compiled.split(self._compiled.look(state, batch, self._values))
        latest = zip(*map(self._compiled.split, self._latest))
        tails = [self._tails.get(i, own) for i, own in enumerate(latest)]
        return [
            {
                **{name: float(value) for name, value in looked.items()},
                'gradient_norm': float(np.mean([sums['gradient_norm'] for sums in tail])),
                'training_loss': float(
                    sum(sums['loss'] for sums in tail) / sum(sums['count'] for sums in tail)
                ),
            }
            for looked, tail in zip(found, tails)
        ]

    def judge(self, number: int, state: State, split: str) -> list[Judgement]:
        """Judge each run on a split, in inference, by the functions of phase `number`."""
        phase, split_runs = self._phases[number], self._compiled.split
        sums: list[Any] = [None] * len(self.curves)
        right, losses = ([[] for _ in sums] for _ in range(2))
        for batch in phase.train.split(split):
            for i, found in enumerate(split_runs(phase.eval_step(state, batch, self._values))):
                mask = found.pop('mask')
                losses[i].append(found.pop('image_loss')[mask])
                right[i].append(found.pop('image_right')[mask])
                sums[i] = metrics.add(sums[i], found)
        results = map(metrics.result, sums)
        return [
            Judgement(
                {**metrics.scalars(result), 'count': result['count']},
                np.concatenate(right[i]),
                np.concatenate(losses[i]),
            )
            for i, result in enumerate(results)
        ]


class _Stacked:
    """The batches of the runs in one phase: images, or features of their frozen backbones."""

    def __init__(self, configs, compiled: Compiled, phase: Phase, states, dealt):
        self._stack = compiled.stack
        self._runs = []
        for config, state, own in zip(configs, states, dealt):
            size = config.data.eval_batch or config.data.batch
            # Evaluated on its training images, too: the gap to the test images is part of a result.
            evaluated = {'train': own.train, 'validation': own.evaluate, 'test': own.test}
            order = {'batch': config.data.batch, 'balance': config.data.balance}
            splits = [with_order(own.train, seed=config.seed, **order)]
            splits += [with_order(each, batch=size) for each in evaluated.values() if each]
            if phase.program.cached:
                program = replace(phase.program, config=config)
                splits = setup.features(program, compiled.description, state, *splits)
            self._runs.append(dict(zip(('training', *evaluated), splits)))

    def train(self, start: int) -> Iterator[Any]:
        """The training batches from step `start` on."""
        return map(self._stack, zip(*(run['training'].train(start) for run in self._runs)))

    def split(self, name: str) -> Iterator[Any]:
        """The examples of a split, `train`, `validation` or `test`, once and not augmented.

        Folds differ by an image, and so perhaps by a batch: in its place the last one is masked.
        """
        latest: list[Any] = [None] * len(self._runs)
        for batches in itertools.zip_longest(*(run[name].evaluate() for run in self._runs)):
            for i, batch in enumerate(batches):
                spent = batch is None
                latest[i] = latest[i] | {'mask': latest[i]['mask'] & False} if spent else batch
            yield self._stack(latest)
