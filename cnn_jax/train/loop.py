"""The training loop: steps, metrics, evaluation, checkpoints, stopping and going on."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from cnn_jax import config as cfg
from cnn_jax import mesh
from cnn_jax.mesh import Layout
from cnn_jax.tools.profile import LayerProfile, Stopwatch
from cnn_jax.tools.progress import Interruption, Progress
from cnn_jax.train import early_stopping, metrics, nonfinite, precise_norm
from cnn_jax.train.early_stopping import Best
from cnn_jax.train.meter import Meter
from cnn_jax.train.record import Record
from cnn_jax.train.shared import Unrecorded, jitted, open_checkpoints, placed
from cnn_jax.train.state import State, Values
from cnn_jax.train.step import Steps, values_of
from cnn_jax.train.task import Task


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the same parameters are trained.

    Attributes:
        steps: Its functions.
        end: The step after which it is over.
        train, evaluate: The batches of both splits, as `data.batches.open_batches` or
            `features.FeatureBatches` gives them.
    """

    steps: Steps
    end: int
    train: Any
    evaluate: Any


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended: the final evaluation, or stopped before it on request.

    With `train.patience`, the state and its evaluation are the best of the run.
    """

    state: State
    metrics: dict[str, Any] | None
    stopped: bool
    compilations: list[dict[str, int]]  # of each phase
    speeds: list[list[float]]  # images/s of the training steps of each phase, between evaluations
    stalls: list[list[float]]  # the fraction of that time in which the device waited for data


def fit(
    config: cfg.Config,
    task: Task,
    phases: list[Phase],
    state: State,
    folder: Path,
    *,
    layout: Layout | None = None,
    live: bool | None = None,
    profile: LayerProfile | None = None,
    saved: Callable[[], object] | None = None,
) -> Outcome:
    """Train from the latest checkpoint in `folder`, or from the start, to the last step.

    Args:
        config: A validated config.
        task: As `setup.make_task` gives it.
        phases: In order; the last one's end is the end of the run.
        state: The state before the first step.
        folder: The work directory; process 0 uses it.
        layout: Of batches and state, on several devices.
        live: Whether to draw a progress bar; by default on a terminal.
        profile: Traces some of the steps.
        saved: Called after each checkpoint, in every process.

    Errors:
        RunFailed: The loss is no longer finite, or the disk is full.
        UserError: There are checkpoints, but none that can be used.
    """
    run = _Run(config, task, phases, state, folder, layout, live, profile, saved)
    return run.to_its_end()


class _Run:
    """One call of `fit`: what its parts use, and where it stands."""

    def __init__(
        self,
        config: cfg.Config,
        task: Task,
        phases: list[Phase],
        state: State,
        folder: Path,
        layout: Layout | None,
        live: bool | None,
        profile: LayerProfile | None,
        saved: Callable[[], object] | None,
    ):
        self.config, self.task, self.phases, self.layout = config, task, phases, layout
        self.profile, self.saved = profile, saved
        self.values = values_of(config)
        self.checkpoints = open_checkpoints(folder / 'checkpoints', config, layout)
        self.record = Record(folder) if mesh.is_process_zero() else Unrecorded(folder)
        self.meter = Meter(self.checkpoints, self.record, self._explain)
        self.state, self.step, self.current, self.best = placed(state, layout), 0, 0, Best()
        self.notes: list[str] = []
        self._start()
        total, size = phases[-1].end, config.data.batch
        self.progress = Progress(total, self.step, size, task.steps_per_epoch, live)
        self.interruption = Interruption()
        self.stop, self.over = False, self._out_of_patience()
        self.result, self.best_result = None, None  # of the last evaluation, and of the best
        self.watches = [Stopwatch(size, phase.train.streams) for phase in phases]

    def to_its_end(self) -> Outcome:
        """Train all phases that are left, until one stops."""
        compiled = []
        with self.interruption, self.progress:
            for note in self.notes:  # whoever reads them may ask to stop
                self.progress.say(note)
            for number in range(self.current, len(self.phases)):
                if number > self.current:
                    self.state = self.phases[number].steps.enter(self.state)
                compiled.append(self._train(self.phases[number], self.watches[number]))
                if self.stop:
                    break
        self.record.close()
        self.checkpoints.close()
        laps, stalls = zip(*((watch.laps, watch.stalls) for watch in self.watches))
        return Outcome(
            self.state, self.result, not self._finished(), compiled, list(laps), list(stalls)
        )

    def _start(self) -> None:
        """Go to the newest saved state, or stay at the given one."""
        found = self.checkpoints.resumable(
            lambda progress: self.record.fault(progress['record']), self.notes.append
        )
        if found is None:
            if self.record.begun():
                self.notes.append('no checkpoint had been saved: starting again from step 0')
            self.record.resume(0, None)
            return
        self.step, progress = found
        state, self.current = entered(self.phases, self.state, self.step)
        self.state, _ = self.checkpoints.restore(self.step, placed(state, self.layout))
        self.record.resume(self.step, progress['record'])
        self.meter.resume(progress['sums'])
        if progress.get('best'):
            self.best = Best(**progress['best'])
        end = self.phases[-1].end
        self.notes.append(f'going on from the checkpoint of step {self.step} of {end}')

    def _train(self, phase: Phase, watch: Stopwatch) -> dict[str, int]:
        """Take the steps of a phase; returns how often its functions were compiled."""
        config, due = self.config, self.task.due
        train_step, eval_step, estimate = jitted(phase.steps, self.layout, self.state)
        batches, sums = phase.train.train(self.step), None
        while self.step < phase.end and not self.stop and not self.over:
            with watch.waiting(sums and sums['objective']):
                batch = next(batches)
            if self.profile:
                self.profile.before(self.state)
            self.state, sums = train_step(self.state, batch, self.values)
            self.step += 1
            watch.step(sums)
            self.meter.add(self.step, sums)
            if self.meter.latest:
                self.progress.step(self.step, *self.meter.latest)
            self.stop = self.interruption.stops_after(self.step)
            if self.profile:
                last = self.stop or self.step == phase.end
                arguments = self.state, batch, self.values
                if text := self.profile.after(self.step, train_step, arguments, last):
                    self.progress.say(text)
                    watch.discard()
            evaluating = due(self.step, config.train.eval_every)
            saving = self.stop or due(self.step, config.train.checkpoint_every)
            scores = None
            if not evaluating and not saving:
                continue
            self.meter.drain()
            with watch.paused():
                if config.train.precise_norm:
                    taken = itertools.islice(phase.train.train(0), config.train.precise_norm)
                    self.state = precise_norm.renewed(estimate, self.state, taken, self.values)
                if evaluating:
                    scores = self._evaluate(eval_step, phase, watch)
                    saving |= self.over or self.best_result is self.result
                if saving:
                    self._save(scores)
        watch.lap()
        if self._finished():
            self._conclude(eval_step, phase)
        return {'train': compilations(train_step), 'evaluate': compilations(eval_step)}

    def _evaluate(self, eval_step, phase: Phase, watch: Stopwatch) -> dict[str, float]:
        """Evaluate, write down and show the metrics of both splits; returns the evaluation's."""
        speed, began = watch.lap(), time.perf_counter()
        self.result = self._metrics(eval_step, phase)
        seconds = time.perf_counter() - began
        timing = {'images_per_second': speed, 'evaluation_seconds': seconds}
        self.record.timing(self.step, timing | {'waiting_share': watch.stalled})
        train_metrics = metrics.result(self.meter.take())
        epoch = round(self.step / self.task.steps_per_epoch, 6)
        for split, found in (('train', train_metrics), ('eval', self.result)):
            self.record.metrics(self.step, split, {'epoch': epoch, **metrics.as_json(found)})
        self.progress.say(
            f'epoch {epoch:.2f}  step {self.step}  '
            f'train loss {train_metrics["loss"]:.4f} accuracy {train_metrics["accuracy"]:.4f}  '
            f'eval loss {self.result["loss"]:.4f} accuracy {self.result["accuracy"]:.4f}  '
            f'{speed:,.0f} images/s'
        )
        scores = metrics.scalars(self.result)
        if self.config.train.patience:
            score = early_stopping.score_of(self.config, scores)
            self.best = self.best.after(self.step, score)
            self.over = self._out_of_patience()
            if score >= self.best.score:
                self.best_result = self.result
        return scores

    def _save(self, scores: dict[str, float] | None) -> None:
        position = {'sums': self.meter.pending_sums(), 'record': self.record.position()}
        if self.config.train.patience:
            position['best'] = dataclasses.asdict(self.best) if self.best.step else None
        self.checkpoints.save(self.state, position, scores)
        if self.saved:
            self.saved()

    def _conclude(self, eval_step, phase: Phase) -> None:
        """With patience, return to the best state; evaluate what is left, if that is not done."""
        if self.config.train.patience:
            chosen = self.checkpoints.best()
            assert chosen is not None, 'each better evaluation is followed by a checkpoint'
            self.state, _ = self.checkpoints.restore(chosen, self.state)
            self.result = self.best_result
            self.progress.say(f'the weights are those of step {chosen}, the best of {self.step}')
        if self.result is None:
            self.result = self._metrics(eval_step, phase)

    def _metrics(self, eval_step, phase: Phase) -> dict[str, Any]:
        batches = phase.evaluate.evaluate()
        return metrics.result(sum_metrics(eval_step, self.state, batches, self.values))

    def _finished(self) -> bool:
        return self.step == self.phases[-1].end or self.over

    def _out_of_patience(self) -> bool:
        evaluated = self.task.due(self.step, self.config.train.eval_every)
        per_epoch = self.task.steps_per_epoch
        return evaluated and early_stopping.is_over(self.config, self.best, self.step, per_epoch)

    def _explain(self, failing: int) -> str:
        """Where a step stopped being finite, from the run repeated up to it."""
        saved = self.checkpoints.latest() or 0
        if mesh.is_multiprocess():
            return 'only one process can look where; give it a copy of --workdir'
        steps = [phase.steps for phase in self.phases]
        before, number = entered(self.phases, steps[0].init(self.config.seed), saved)
        if saved:
            before, _ = self.checkpoints.restore(saved, before)
        before = placed(before, self.layout)
        self.progress.say(
            f'step {failing} is not finite: repeating it from step {saved} to see why'
        )
        found = nonfinite.replay(
            self.phases, number, before, saved, failing, self.values, self.layout
        )
        number, before, batch = jax.device_get(found) if self.layout else found
        return nonfinite.locate(self.config, self.task, number, steps[number].cached, before, batch)


def sum_metrics(eval_step, state: State, batches: Iterable, values: Values) -> metrics.Sums:
    """The metrics' sums over a whole split; padding is not counted."""
    total = None
    for batch in batches:
        total = metrics.add(total, eval_step(state, batch, values))
    assert total is not None, 'a split has at least one batch'
    return total


def compilations(jitted: Any) -> int:
    """How often XLA compiled a jitted function."""
    return jitted._cache_size()


def entered(phases: list[Phase], state: State, step: int) -> tuple[State, int]:
    """A state of the structure that a checkpoint of `step` has, and the number of its phase."""
    # A checkpoint at a phase's last step was saved before the next one was entered.
    current = next((k for k, phase in enumerate(phases) if step <= phase.end), len(phases) - 1)
    for phase in phases[1 : current + 1]:
        state = phase.steps.enter(state)
    return state, current
