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
from cnn_jax import processes
from cnn_jax.mesh import Layout
from cnn_jax.train import early_stopping, metrics, nonfinite, precise_norm
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.early_stopping import Best
from cnn_jax.train.interruption import Interruption
from cnn_jax.train.meter import Meter
from cnn_jax.train.profile import Profile
from cnn_jax.train.progress import Progress
from cnn_jax.train.record import Record
from cnn_jax.train.shared import SharedCheckpoints, Unrecorded, jitted, open_checkpoints, placed
from cnn_jax.train.speed import Stopwatch
from cnn_jax.train.state import State, Values
from cnn_jax.train.step import Steps, values_of
from cnn_jax.train.task import Task
from cnn_jax.train.waiting import Waiting


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
    waited: list[list[float]]  # the share of that time in which the device waited for data


def fit(
    config: cfg.Config,
    task: Task,
    phases: list[Phase],
    state: State,
    folder: Path,
    *,
    layout: Layout | None = None,
    live: bool | None = None,
    profile: Profile | None = None,
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
    total = phases[-1].end
    values = values_of(config)
    checkpoints = open_checkpoints(folder / 'checkpoints', config, layout)
    record = Record(folder) if processes.is_first() else Unrecorded(folder)
    state = placed(state, layout)

    def explain(failing: int) -> str:
        """Where a step stopped being finite, from the run repeated up to it."""
        saved = checkpoints.latest() or 0
        if processes.several():
            return 'only one process can look where; give it a copy of --workdir'
        before, number = entered(phases, phases[0].steps.init(config.seed), saved)
        if saved:
            before, _ = checkpoints.restore(saved, before)
        before = placed(before, layout)
        progress.say(f'step {failing} is not finite: repeating it from step {saved} to see why')
        found = nonfinite.replay(phases, number, before, saved, failing, values, layout)
        number, before, batch = jax.device_get(found) if layout else found
        return nonfinite.locate(config, task, number, phases[number].steps.cached, before, batch)

    meter = Meter(checkpoints, record, explain)
    notes: list[str] = []
    state, step, current, best = _start(state, phases, checkpoints, record, meter, notes.append)
    progress = Progress(total, step, config.data.batch, task.steps_per_epoch, live)

    def report(step: int, eval_metrics: dict[str, Any], speed: float) -> None:
        """Write down and show the metrics of both splits since the last report."""
        train_metrics = metrics.result(meter.take())
        epoch = round(step / task.steps_per_epoch, 6)
        for split, result in (('train', train_metrics), ('eval', eval_metrics)):
            record.metrics(step, split, {'epoch': epoch, **metrics.as_json(result)})
        progress.say(
            f'epoch {epoch:.2f}  step {step}  '
            f'train loss {train_metrics["loss"]:.4f} accuracy {train_metrics["accuracy"]:.4f}  '
            f'eval loss {eval_metrics["loss"]:.4f} accuracy {eval_metrics["accuracy"]:.4f}  '
            f'{speed:,.0f} images/s'
        )

    def out_of_patience(step: int) -> bool:
        evaluated = task.due(step, config.train.eval_every)
        return evaluated and early_stopping.is_over(config, best, step, task.steps_per_epoch)

    result, best_result, compiled = None, None, []
    stop, over = False, out_of_patience(step)
    waits = [Waiting() if phase.train.streams else None for phase in phases]
    watches = [Stopwatch(config.data.batch, waiting) for waiting in waits]
    with Interruption() as interruption, progress:
        for note in notes:  # whoever reads them may ask to stop
            progress.say(note)
        for number, phase in enumerate(phases[current:], start=current):
            if number > current:
                state = phase.steps.enter(state)
            train_step, eval_step, estimate = jitted(phase.steps, layout, state)
            batches = phase.train.train(step)
            watch, sums = watches[number], None
            while step < phase.end and not stop and not over:
                batch = watch.next(batches, sums)
                if profile:
                    profile.before(state)
                state, sums = train_step(state, batch, values)
                step += 1
                meter.add(step, sums)
                if meter.latest:
                    progress.step(step, *meter.latest)
                stop, scores = interruption.stops_after(step), None
                if profile:
                    last = stop or step == phase.end
                    text = profile.after(step, train_step, (state, batch, values), last)
                    if text:
                        progress.say(text)
                        watch.drop()
                evaluating = task.due(step, config.train.eval_every)
                saving = stop or task.due(step, config.train.checkpoint_every)
                if evaluating or saving:
                    meter.drain()
                    watch.stop(step)
                    if config.train.precise_norm:
                        taken = itertools.islice(phase.train.train(0), config.train.precise_norm)
                        state = precise_norm.renewed(estimate, state, taken, values)
                if evaluating:
                    whole = progress.restart_clock(step)
                    speed, began = watch.lap() or whole, time.perf_counter()
                    result = metrics.result(
                        sum_metrics(eval_step, state, phase.evaluate.evaluate(), values)
                    )
                    seconds = time.perf_counter() - began
                    timing = {'images_per_second': speed, 'evaluation_seconds': seconds}
                    record.timing(step, timing | {'waiting_share': watch.share})
                    report(step, result, speed)
                    scores = metrics.scalars(result)
                    if config.train.patience:
                        score = early_stopping.score_of(config, scores)
                        best = best.after(step, score)
                        over = out_of_patience(step)
                        if score >= best.score:
                            saving, best_result = True, result
                        saving |= over
                    progress.restart_clock(step)
                if saving:
                    position = {'sums': meter.pending_sums(), 'record': record.position()}
                    if config.train.patience:
                        position['best'] = dataclasses.asdict(best) if best.step else None
                    checkpoints.save(state, position, scores)
                    if saved:
                        saved()
                if not watch.running:  # it has not seen the first step, which was compiled
                    jax.block_until_ready(sums)
                    watch.start(step)
            watch.lap()
            finished = step == total or over
            if finished and config.train.patience:
                chosen = checkpoints.best()
                assert chosen is not None, 'each better evaluation is followed by a checkpoint'
                (state, _), result = checkpoints.restore(chosen, state), best_result
                progress.say(f'the weights are those of step {chosen}, the best of {step}')
            if finished and result is None:
                sums = sum_metrics(eval_step, state, phase.evaluate.evaluate(), values)
                result = metrics.result(sums)
            compiled.append(
                {'train': compilations(train_step), 'evaluate': compilations(eval_step)}
            )
            if stop:
                break
    record.close()
    checkpoints.close()
    stopped = step < total and not over
    laps, waited = [watch.laps for watch in watches], [watch.waited for watch in watches]
    return Outcome(state, result, stopped, compiled, laps, waited)


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


def _start(
    state: State,
    phases: list[Phase],
    checkpoints: Checkpoints | SharedCheckpoints,
    record: Record,
    meter: Meter,
    say: Callable[[str], object],
) -> tuple[State, int, int, Best]:
    """The newest saved state, or the given one; the steps done; their phase; the best of them."""
    found = checkpoints.resumable(lambda progress: record.fault(progress['record']), say)
    if found is None:
        if record.begun():
            say('no checkpoint had been saved: starting again from step 0')
        record.resume(0, None)
        return state, 0, 0, Best()
    step, progress = found
    state, current = entered(phases, state, step)
    state, _ = checkpoints.restore(step, state)
    record.resume(step, progress['record'])
    meter.resume(progress['sums'])
    say(f'going on from the checkpoint of step {step} of {phases[-1].end}')
    best = progress.get('best')
    return state, step, current, Best(**best) if best else Best()
