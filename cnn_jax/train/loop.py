"""The training loop: one generator of steps, and the function that records what it yields.

`steps` is the only loop over training steps. `train` adds metrics, evaluation, checkpoints and
stopping; the cells of an ablation, `launch.verify`, the search for a value that is not finite and
the learning-rate finder consume the same generator.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import mesh
from cnn_jax.data.batches import Batch
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.mesh import Layout
from cnn_jax.tools import nonfinite
from cnn_jax.tools.profile import Stopwatch
from cnn_jax.tools.progress import Interruption, Progress
from cnn_jax.train import metrics, step
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.metrics import EarlyStopping, NotFinite, StepMetrics
from cnn_jax.train.program import (
    Program,
    RunSpec,
    State,
    Values,
    begin_phase,
    frozen_weights,
    state_maker,
    traced_values,
)
from cnn_jax.train.record import NullRecord, Record


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the same parameters are trained: its functions and its batches.

    `end` is the step after which it is over; `begin` goes from the last state of the phase before
    to the first of this one; the other functions are those of `train.step`, compiled.
    """

    program: Program
    end: int
    begin: Callable[[State], State]
    train_step: Callable[[State, Batch, Values], tuple[State, metrics.Sums]]
    eval_step: Callable[[State, Batch, Values], metrics.Sums]
    estimate: Callable[..., dict[str, Any]]
    predict: Callable[..., Any]
    train: Any = None
    evaluate: Any = None

    def metrics(self, state: State, values: Values) -> dict[str, Any]:
        """The metrics of the evaluation split in inference."""
        total = None
        for batch in self.evaluate.evaluate():
            total = metrics.add(total, self.eval_step(state, batch, values))
        assert total is not None, 'a split has at least one batch'
        return metrics.result(total)


def compile_phase(
    program: Program, end: int, state: State, layout: Layout | None = None, **batches: Any
) -> Phase:
    """Jit the functions of a phase.

    On several devices the new state lies as `layout` says, and metrics on each of them. `state`
    is one of the phase, or its shapes; `batches` are `train` and `evaluate`.
    """
    copies = layout.replicated if layout else None
    of_step = (layout.state_sharding(state), copies) if layout else None

    def jitted(function: Callable, shardings: Any = copies, **options: Any) -> Callable:
        bound = functools.partial(function, program)
        return jax.jit(bound, out_shardings=shardings, **options)

    return Phase(
        program,
        end,
        begin=functools.partial(begin_phase, program),
        train_step=jitted(step.train_step, of_step, donate_argnums=0),
        eval_step=jitted(step.eval_step),
        estimate=jitted(step.estimate_step),
        predict=jitted(step.predict_step),
        **batches,
    )


class Step(NamedTuple):
    """A training step that was taken: its number from 1, and the state and sums after it."""

    number: int
    phase: Phase
    batch: Batch
    state: State
    sums: metrics.Sums


def steps(
    phases: Sequence[Phase],
    state: State,
    start: int,
    values: Values,
    *,
    end: int | None = None,
    feed: Callable[[Phase, Iterator[Batch]], Iterator[Batch]] = lambda phase, batches: batches,
) -> Iterator[Step]:
    """Train from step `start` on, beginning phases as they come.

    Args:
        phases, values: The run, and its config's numbers, which may be changed between steps.
        state: The state after step `start`; its memory is given away.
        end: The last step; None for the end of the run.
        feed: Passes on the batches of a phase; the loop times them.

    Yields:
        Each step once it is dispatched; the device may still be computing it.
    """
    last = phases[-1].end if end is None else end
    first, number = phase_at(phases, start), start
    for i, phase in enumerate(phases[first:]):
        if number >= last:
            return
        if i:
            state = phase.begin(state)
        batches = feed(phase, phase.train.train(number))
        while number < min(phase.end, last):
            batch = next(batches)
            state, sums = phase.train_step(state, batch, values)
            number += 1
            yield Step(number, phase, batch, state, sums)


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """The position of the phase that the state after a step belongs to.

    The state after a phase's last step is still that phase's: the next one has not begun.
    """
    return next((k for k, phase in enumerate(phases) if step <= phase.end), len(phases) - 1)


def state_at(phases: Sequence[Phase], state: State, step: int) -> State:
    """A state with the structure of the one after `step`, from the state before the first step."""
    for phase in phases[1 : phase_at(phases, step) + 1]:
        state = phase.begin(state)
    return state


def with_eval_statistics(config: cfg.Config, phase: Phase, state: State, values: Values) -> State:
    """The state with batch statistics of the evaluated weights, if `train.precise_norm` asks.

    They are taken from the first batches of training, in their order, not augmented.
    """
    batches = itertools.islice(phase.train.train(0), config.train.precise_norm)
    for count, batch in enumerate(batches, start=1):
        statistics = phase.estimate(state, batch, np.int32(count), values)
        state = dataclasses.replace(state, eval_batch_stats=statistics)
    return state


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call of `train`: the last state, or with `train.patience` the best.

    `metrics` are None if the run was interrupted (`stopped`) before its final evaluation.
    `compilations` are those of each function of each phase; `watches` hold the phases' speeds.
    """

    state: State
    metrics: dict[str, Any] | None
    stopped: bool
    compilations: list[dict[str, int]]
    watches: list[Stopwatch]


def train(
    config: cfg.Config,
    spec: RunSpec,
    phases: list[Phase],
    state: State,
    folder: Path,
    *,
    layout: Layout | None = None,
    live: bool | None = None,
    profile: Callable[..., Iterator[Step]] | None = None,
    saved: Callable[[], object] | None = None,
    scalars: Callable[..., object] = lambda *_: None,
) -> Outcome:
    """Train from the latest checkpoint in `folder`, or from `state`, to the last step.

    Args:
        config, spec, phases, layout: The run.
        state: The state before the first step.
        folder: The work directory; process 0 uses it.
        live: As for `run.fit`.
        profile: `tools.profile.trace` with its first two arguments, to trace some of the steps.
        saved: Called after each checkpoint, in every process.
        scalars: Called in process 0 with a step and its metrics by name.

    Errors:
        RunFailed: The loss is no longer finite, or the disk is full.
        UserError: There are checkpoints, but none that can be used.
    """
    run = _Session(config, spec, phases, folder, layout, saved, scalars)
    start, before, notes = run.resume(state)
    stopped, over = False, run.is_over(start)

    def feed(phase: Phase, batches: Iterator[Batch]) -> Iterator[Batch]:
        return run.watch(phase).feed(batches)

    with (
        Interruption() as interruption,
        Progress(phases[-1].end, start, config.data.batch, spec.steps_per_epoch, live) as progress,
    ):
        for note in notes:
            progress.say(note)
        state, end = before, start if over else None
        taking = steps(phases, before, start, run.values, end=end, feed=feed)
        if profile:
            taking = profile(taking, run.values, run.watch, progress.say)
        for taken in taking:
            state = taken.state
            run.count(taken, progress)
            stopped = interruption.stops_after(taken.number)
            evaluating = spec.is_boundary(taken.number, config.train.eval_every)
            saving = stopped or spec.is_boundary(taken.number, config.train.checkpoint_every)
            if evaluating or saving:
                state, over = run.pause(taken, evaluating, saving, progress)
            if stopped or over:
                break
        finished = over or int(state.step) == phases[-1].end
        if finished:
            state = run.conclude(state, progress)
    return run.close(state, stopped=not finished)


class _Session:
    """The files, metrics and best evaluation of a call of `train`."""

    def __init__(
        self,
        config: cfg.Config,
        spec: RunSpec,
        phases: list[Phase],
        folder: Path,
        layout: Layout | None,
        saved: Callable[[], object] | None,
        scalars: Callable[..., object],
    ):
        self.config, self.spec, self.phases, self.layout = config, spec, phases, layout
        self.values, self._saved = traced_values(config), saved
        frozen = functools.partial(frozen_weights, phases[0].program)
        self.checkpoints = Checkpoints(folder / 'checkpoints', config, layout, frozen)
        self.record = Record(folder, scalars) if mesh.is_process_zero() else NullRecord()
        self.watches = [Stopwatch(config.data.batch, phase.train.streams) for phase in phases]
        self.best = EarlyStopping()
        self.result: dict[str, Any] | None = None  # of the last evaluation
        self.evaluated = 0  # the step of it
        self.best_result: dict[str, Any] | None = None

    def resume(self, state: State) -> tuple[int, State, list[str]]:
        """The newest checkpoint's step and state, or the first, and what the user should know."""
        notes: list[str] = []
        self._first_statistics = {
            name: jax.device_get(getattr(state, name))
            for name in ('batch_stats', 'eval_batch_stats')
        }
        found = self.checkpoints.resumable(notes.append)
        if found is None:
            notes += self.record.resume(0, None)
            self.meter = StepMetrics(self.record.step, None)
            return 0, shard_state(state, self.layout), notes
        start, progress = found
        like = jax.eval_shape(lambda first: state_at(self.phases, first, start), state)
        state, _ = self.checkpoints.restore(start, like)
        notes += self.record.resume(start, self.checkpoints.place(start))
        self.meter = StepMetrics(self.record.step, progress['sums'])
        if progress.get('best'):
            self.best = EarlyStopping(**progress['best'])
        notes.append(f'resuming from the checkpoint of step {start} of {self.phases[-1].end}')
        return start, state, notes

    def watch(self, phase: Phase) -> Stopwatch:
        """The stopwatch of a phase."""
        return self.watches[phase.program.phase]

    def count(self, taken: Step, progress: Progress) -> None:
        """Count a step that may still be running, and add its sums."""
        self.watch(taken.phase).step(taken.sums)
        with self.explained(progress):
            self.meter.add(taken.number, taken.sums)
        if self.meter.latest:
            progress.step(taken.number, *self.meter.latest)

    def pause(
        self, taken: Step, evaluating: bool, saving: bool, progress: Progress
    ) -> tuple[State, bool]:
        """Wait for the steps, then evaluate and save as it is due.

        Returns:
            The state with the statistics of the evaluated weights; whether the run is over.
        """
        number, phase = taken.number, taken.phase
        with self.explained(progress):
            self.meter.flush()
        with self.watch(phase).paused():
            state = with_eval_statistics(self.config, phase, taken.state, self.values)
            scores = self.evaluate(number, phase, state, progress) if evaluating else None
            over = evaluating and self.is_over(number)
            best = evaluating and self.best_result is self.result  # with early stopping
            if saving or over or best:
                self.save(state, scores)
        return state, over

    def evaluate(
        self, number: int, phase: Phase, state: State, progress: Progress
    ) -> dict[str, float]:
        """Evaluate, write down and print the metrics of both splits; return the evaluation's."""
        watch = self.watch(phase)
        timing = {'images_per_second': watch.lap(), 'waiting_share': watch.stalled}
        speed, began = timing['images_per_second'], time.perf_counter()
        result = phase.metrics(state, self.values)
        timing['evaluation_seconds'] = time.perf_counter() - began
        self.record.timing(number, timing)
        training = metrics.result(self.meter.pop())
        epoch = round(number / self.spec.steps_per_epoch, 6)
        for split, each in (('train', training), ('eval', result)):
            self.record.metrics(number, split, {'epoch': epoch, **metrics.as_json(each)})
        progress.say(
            f'epoch {epoch:.2f}  step {number}  '
            f'train loss {training["loss"]:.4f} accuracy {training["accuracy"]:.4f}  '
            f'eval loss {result["loss"]:.4f} accuracy {result["accuracy"]:.4f}  '
            f'{speed:,.0f} images/s'
        )
        self.result, self.evaluated = result, number
        scores = metrics.scalars(result)
        if self.config.train.patience:
            score = metrics.score_of(self.config, scores)
            self.best = self.best.after(number, score)
            if score >= self.best.score:
                self.best_result = result
        return scores

    def is_over(self, number: int) -> bool:
        """Return whether early stopping ends the run at this step."""
        evaluated = self.spec.is_boundary(number, self.config.train.eval_every)
        return evaluated and self.best.is_over(self.config, number, self.spec.steps_per_epoch)

    def save(self, state: State, scores: dict[str, float] | None) -> None:
        """Write a checkpoint."""
        position: dict[str, Any] = {'sums': self.meter.pending()}
        if self.config.train.patience:
            position['best'] = dataclasses.asdict(self.best) if self.best.step else None
        self.checkpoints.save(state, position, scores, self.record.snapshot())
        if self._saved:
            self._saved()

    def conclude(self, state: State, progress: Progress) -> State:
        """Go back to the best state with early stopping; evaluate, if that is not done."""
        phase, number = self.phases[-1], int(state.step)
        if self.config.train.patience:
            best = self.checkpoints.best()
            assert best is not None, 'each better evaluation is followed by a checkpoint'
            try:
                state, _ = self.checkpoints.restore(best, state)
            except UserError as error:
                progress.say(f'{error}; the weights are those of step {number}, the last')
            else:
                self.result = self.best_result
                progress.say(f'the weights are those of step {best}, the best of {number}')
        if self.result is None:
            self.result = phase.metrics(state, self.values)
        return state

    def close(self, state: State, stopped: bool) -> Outcome:
        """Close all files."""
        self.record.close()
        counts = [
            {'train': compilations(phase.train_step), 'eval': compilations(phase.eval_step)}
            for phase in self.phases
        ]
        result = None if stopped and self.evaluated != int(state.step) else self.result
        return Outcome(state, result, stopped, counts, self.watches)

    @contextlib.contextmanager
    def explained(self, progress: Progress) -> Iterator[None]:
        """Turn a step that is not finite into an error; repeating the run up to it tells why."""
        try:
            yield
        except NotFinite as error:
            failing, saved = error.step, self.checkpoints.latest() or 0
        else:
            return
        why = 'only one process can look where; give it a copy of --workdir'
        if not mesh.is_multiprocess():
            progress.say(f'step {failing} is not finite: repeating it from step {saved} to see why')
            before = state_maker(self.phases[0].program)(self.config.seed)
            before = dataclasses.replace(before, **self._first_statistics)
            before = shard_state(state_at(self.phases, before, saved), self.layout)
            if saved:
                before, _ = self.checkpoints.restore(saved, before)
            found: Any
            phase, *found = before_step(self.phases, before, saved, failing, self.values)
            why = nonfinite.locate(
                phase.program, *(jax.device_get(found) if self.layout else found)
            )
        where = f'the last good checkpoint is step {saved}' if saved else 'nothing was saved yet'
        raise RunFailed(
            f'the loss or its gradient is not finite at step {failing}: {why}; {where}. Try a '
            'lower config.optimizer.learning_rate, config.optimizer.clip_norm=1 or a warm-up '
            '(config.optimizer.warmup_epochs) in a new --workdir'
        )


def before_step(
    phases: Sequence[Phase], state: State, start: int, step: int, values: Values
) -> tuple[Phase, State, Batch]:
    """Repeat a run (as `steps`) up to a step: its phase, the state before it, and its batch."""
    for taken in steps(phases, state, start, values, end=step - 1):
        state = taken.state
    old, new = phase_at(phases, step - 1), phase_at(phases, step)
    if new != old:
        state = phases[new].begin(state)
    return phases[new], state, next(phases[new].train.train(step - 1))


def shard_state(state: State, layout: Layout | None) -> State:
    """Put a state where it belongs: on several devices, as the layout says."""
    return layout.shard(state) if layout else state


def compilations(jitted: Any) -> int:
    """The number of times that XLA compiled a jitted function."""
    return jitted._cache_size()
