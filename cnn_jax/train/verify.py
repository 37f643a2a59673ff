"""Whether a run can be had again: parts of it trained once more, and compared bit for bit."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.mesh import Layout
from cnn_jax.train import manifest
from cnn_jax.train.checkpoint import Checkpoints, digest
from cnn_jax.train.loop import Phase, entered
from cnn_jax.train.record import read_steps
from cnn_jax.train.shared import jitted, placed
from cnn_jax.train.state import State
from cnn_jax.train.step import values_of

Tell = Callable[[str, str], object]  # what was compared, and how it differs ('': not at all)


def verify(
    config: cfg.Config,
    phases: list[Phase],
    state: State,
    folder: Path,
    steps: int,
    tell: Tell,
    layout: Layout | None = None,
) -> bool:
    """Train the first steps again, and those after the newest checkpoint that has some after it.

    The objective and the gradient norm of each step must have the bits that `steps.f32` keeps;
    the first state, and that at each checkpoint passed, the digest of what was kept.

    Args:
        config: Of the run.
        phases: As `fit` takes them.
        state: The state before the first step.
        folder: The work directory.
        steps: How many to train again, in both places.
        tell: Called with each comparison.
        layout: Of batches and state, on several devices of this process.

    Returns:
        Whether nothing differs.

    Errors:
        UserError: The run has no recorded step, or a checkpoint is damaged.
    """
    recorded = read_steps(folder)
    if not len(recorded):
        raise UserError(f'{folder} has no step to verify yet; let launch.train reach a checkpoint')
    found: list[str] = []

    def compare(what: str, difference: str) -> None:
        found.append(difference)
        tell(what, difference)

    begun = manifest.read(folder).get('initial_state')
    compare('the state before the first step', '' if digest(state) == begun else 'other values')
    checkpoints = Checkpoints(folder / 'checkpoints', config)
    kept = checkpoints.steps()
    starts = [step for step in kept if step < len(recorded)]

    def restored(step: int) -> State:
        blank, _ = entered(phases, phases[0].steps.init(config.seed), step)
        return checkpoints.restore(step, placed(blank, layout))[0]

    for start in [0, *starts[:1]]:
        end = min(start + steps, len(recorded))
        at_start = restored(start) if start else placed(state, layout)
        again = []
        for step, numbers, now in _trained(config, phases, layout, at_start, start, end):
            again.append(numbers)
            if step in kept:
                # Statistics of the evaluated weights are the loop's, and training never sees them.
                then = dataclasses.replace(restored(step), precise=now.precise)
                same = digest(now) == digest(then)
                compare(f'the checkpoint of step {step}', '' if same else 'other values')
        compare(f'steps {start + 1} to {end}', _difference(start, recorded[start:end], again))
    return not any(found)


def _trained(
    config: cfg.Config,
    phases: list[Phase],
    layout: Layout | None,
    state: State,
    step: int,
    end: int,
) -> Iterator[tuple[int, tuple[float, float], State]]:
    """Each step's number, its objective and gradient norm, and the state after it."""
    values = values_of(config)
    _, current = entered(phases, phases[0].steps.init(config.seed), step)
    for number in range(current, len(phases)):
        if number > current:
            state = phases[number].steps.enter(state)
        train, *_ = jitted(phases[number].steps, layout, state)
        batches = phases[number].train.train(step)
        while step < min(end, phases[number].end):
            state, sums = train(state, next(batches), values)
            step += 1
            yield step, (float(sums['objective']), float(sums['gradient_norm'])), state


def _difference(start: int, before: np.ndarray, again: list[tuple[float, float]]) -> str:
    """Where and by how much the steps differ first, in words."""
    now = np.array(again, np.float32)
    wrong = np.flatnonzero((before.view(np.uint32) != now.view(np.uint32)).any(axis=1))
    if not len(wrong):
        return ''
    first = wrong[0]
    relative = np.abs(now[first] / before[first] - 1).max()
    return (
        f'from step {start + 1 + first} on: objective {before[first, 0]:.9g} then, '
        f'{now[first, 0]:.9g} now (relative difference {relative:.1e})'
    )
