"""Verify that a run is reproducible: train parts of it again, and compare bit for bit."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from cnn_jax.components import reopened
from cnn_jax.errors import UserError
from cnn_jax.mesh import Layout
from cnn_jax.train import manifest, remote, setup
from cnn_jax.train.checkpoint import Checkpoints, digest
from cnn_jax.train.loop import Phase, shard_state, state_at, steps
from cnn_jax.train.program import State, Values, frozen_weights, traced_values
from cnn_jax.train.record import damaged_files, read_steps
from cnn_jax.train.run import start as prepare_process

Tell = Callable[[str, str], object]  # what was compared, and how it differs ('': not at all)


def verify_run(workdir: str, count: int, tell: Tell = print) -> tuple[bool, list[str]]:
    """Train `count` steps again at the start, and after the newest checkpoint with steps after it.

    The objective and the gradient norm of each step must have the bits that `steps.f32` keeps; the
    first state, and that at each checkpoint passed, the digest of what was saved; the data must be
    what predictions take them for. Every file that decides anything is compared with its digest.

    Returns:
        Whether nothing differs; the names of the conditions that have changed, which are printed.

    Errors:
        UserError: There is no run or no recorded step, a file is damaged, the data cannot be had,
            or own parts are missing.
    """
    folder = remote.fetch_workdir(workdir)
    config, before = manifest.read(folder)
    checkpoints = Checkpoints(folder / 'checkpoints', config)
    saved, recorded = checkpoints.steps(), read_steps(folder)
    if not saved:
        raise UserError(f'{folder} has no step to verify yet; let launch.train reach a checkpoint')
    for step in saved:
        checkpoints.check(step)
    settings = prepare_process(manifest.threads(folder, config))
    print(settings)
    components = reopened(config, before)
    if missing := before.get('own', {'digests': {}})['digests'].keys() - components.digests.keys():
        raise UserError(
            f'the run has its own {" and ".join(sorted(missing))}, which its work directory does '
            'not hold; verify takes the runs of an experiment file that brings them'
        )
    had = before['machine'].get('layout') or {}
    layout = setup.layout_of(config, model=had.get('model', 1), fsdp=had.get('fsdp', False))
    data = setup.open_data(config, layout, components)
    now = manifest.manifest(config, settings, data.description, layout)
    changed = manifest.differences(before, now)
    for name, (old, new) in changed.items():
        print(f'changed since the run began: {name}: {old} → {new}')
    spec = setup.make_spec(config, data.description, data.weights, components)
    phases, state = setup.open_phases(config, data, spec, layout)
    frozen = functools.partial(frozen_weights, phases[0].program)
    checkpoints = Checkpoints(folder / 'checkpoints', config, layout, frozen)
    decisive = *manifest.DATA.values(), 'train data', 'eval data'
    differences = [name for name in decisive if name in changed]
    found = [('the state before the first step', _same(digest(state) == before['initial_state']))]
    for name in damaged_files(folder, checkpoints.place(saved[0])):
        found.append((name, 'it was altered since the newest checkpoint was saved'))
    again = _repeat(phases, state, checkpoints, recorded, count, traced_values(config), layout)
    for what, difference in itertools.chain(found, again):
        differences.append(difference)
        tell(what, difference)
    return not any(differences), list(changed)


def _repeat(
    phases: list[Phase],
    state: State,
    checkpoints: Checkpoints,
    recorded: np.ndarray,
    count: int,
    values: Values,
    layout: Layout | None,
) -> Iterator[tuple[str, str]]:
    """Train again from step 0 and from the newest checkpoint with steps after it, and compare."""
    shapes = jax.eval_shape(lambda: state)

    def restored(step: int) -> State:
        like = jax.eval_shape(lambda start: state_at(phases, start, step), shapes)
        return checkpoints.restore(step, like)[0]

    saved = checkpoints.steps()
    starts = [step for step in (*saved, 0) if step < len(recorded)]
    for start in sorted({*starts[:1], *starts[-1:]}):
        end = min(start + count, len(recorded))
        first = restored(start) if start else shard_state(state, layout)
        again = []
        for taken in steps(phases, first, start, values, end=end):
            sums, now = taken.sums, taken.state
            again.append((float(sums['objective']), float(sums['gradient_norm'])))
            if taken.number in saved:
                then = restored(taken.number)
                # The statistics of the evaluated weights are the loop's; training never sees them.
                then = dataclasses.replace(then, eval_batch_stats=now.eval_batch_stats)
                yield f'the checkpoint of step {taken.number}', _same(digest(now) == digest(then))
        yield f'steps {start + 1} to {end}', _difference(start, recorded[start:end], again)


def _same(same: bool) -> str:
    return '' if same else 'other values'


def _difference(start: int, before: np.ndarray, again: list[tuple[float, float]]) -> str:
    """The first difference of the steps, and how large it is, in words."""
    now = np.array(again, np.float32).reshape(-1, 2)
    wrong = np.flatnonzero((before.view(np.uint32) != now.view(np.uint32)).any(axis=1))
    if not len(wrong):
        return ''
    first = wrong[0]
    relative = np.abs(now[first] / before[first] - 1).max()
    return (
        f'from step {start + 1 + first} on: objective {before[first, 0]:.9g} then, '
        f'{now[first, 0]:.9g} now (relative difference {relative:.1e})'
    )
