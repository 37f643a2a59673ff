"""Checkpoints and records: killed, damaged or cut off, a run ends as if nothing had happened."""

import dataclasses
import json
import os
import shutil

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.errors import UserError
from cnn_jax.files import SEAL, read_json, read_sealed_folder, seal_folder, write_json
from cnn_jax.train import checkpoint, record
from cnn_jax.train.checkpoint import Checkpoints, digest
from cnn_jax.train.record import Record, read_steps
from tests.damage import copied_before_each_operation

CONFIG = cfg.replace(cfg.Config(), {'train.keep': 2, 'train.best': 'accuracy'})
END = 8  # steps, with a checkpoint after every second


@flax.struct.dataclass
class State:
    step: jnp.ndarray
    params: dict
    averaged: dict


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(record, 'draw_curves', lambda lines, path: None)


def state_at(step):
    """The state after a step; the training here is that each step is written into the weights."""
    kernel = jnp.arange(12.0).reshape(3, 4) + step
    return State(jnp.int32(step), {'conv': {'kernel': kernel, 'bias': jnp.float32(step)}}, {})


def run(folder, config=CONFIG, last=END):
    """Train, or resume, up to a step; returns what was said."""
    data = {'train': {'fingerprint': ''}}
    facts = {'config_hash': cfg.content_hash(config), 'machine': {'threads': 1}, 'data': data}
    if not (folder / 'checkpoints').exists():
        write_json(folder / 'manifest.json', facts)
    checkpoints, written = Checkpoints(folder / 'checkpoints', config), Record(folder)
    start, said = 0, []
    found = checkpoints.resumable(said.append)
    if found is None:
        written.resume(0, None)
    else:
        start, progress = found
        state, _ = checkpoints.restore(start, state_at(0))
        assert digest(state) == digest(state_at(start))
        assert progress == {'sums': start / 7}
        said += written.resume(start, checkpoints.place(start))
        said.append(f'resumed at {start}')
    for step in range(start + 1, last + 1):
        written.step(1 / step, 1 / 3)
        if step % 2 == 0:
            scores = {'loss': 1 / step, 'accuracy': 0.9 if step == 4 else step / 100}
            written.metrics(step, 'eval', scores)
            written.timing(step, {'images_per_second': 7.0})
            checkpoints.save(state_at(step), {'sums': step / 7}, scores, written.snapshot())
    written.close()
    return said


def end(folder):
    """What must not depend on any disturbance: all files of the record, and the checkpoints."""
    names = ('metrics.jsonl', 'steps.f32', 'timing.jsonl')
    steps = Checkpoints(folder / 'checkpoints', CONFIG).steps()
    return [(folder / name).read_bytes() for name in names], steps


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, 'draw_curves', lambda lines, path: None)
        assert run(folder) == []
    return end(folder)


def test_killed_before_any_file_operation_it_ends_the_same(tmp_path, undisturbed, record_property):
    folder, copies = tmp_path / 'run', tmp_path / 'copies'
    run(folder, last=5)
    with copied_before_each_operation(folder, copies):
        run(folder, last=6)  # resumes, saves one, removes one
    assert len(os.listdir(copies)) > 30
    at = set()
    for name in os.listdir(copies):
        (said,) = run(copies / name)
        at.add(said)
        assert end(copies / name) == undisturbed
    assert at == {f'resumed at {step}' for step in (4, 6)}
    record_property('tried', len(os.listdir(copies)))


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    run(tmp_path, last=4)
    events, real = [], {name: getattr(os, name) for name in ('fsync', 'rename')}

    def fsync(descriptor):
        events.append(('sync', os.readlink(f'/proc/self/fd/{descriptor}')))
        real['fsync'](descriptor)

    def rename(old, new):
        if str(new).endswith('step_6'):
            inside = [path for path in old.rglob('*') if path.name != SEAL]
            assert {('sync', str(path)) for path in (old, *inside)} <= set(events)
        events.append(('rename', os.path.basename(new)))
        real['rename'](old, new)

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'rename', rename)
    run(tmp_path, last=6)
    named = events.index(('rename', 'step_6'))
    assert events[named + 1] == ('sync', str(tmp_path / 'checkpoints'))
    assert events.index(('rename', 'removing')) > named + 1


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


def flip_largest(place):
    flip(max(files(place), key=lambda path: path.stat().st_size))


def files(place):
    return sorted(path for path in place.rglob('*') if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize('damage', [cut, flip, remove])
@pytest.mark.parametrize('which', ['newest', 'oldest'])
def test_any_damaged_file_of_a_checkpoint_is_found(tmp_path, undisturbed, damage, which):
    whole = tmp_path / 'whole'
    run(whole, last=7)
    step, start = (6, 4) if which == 'newest' else (4, 6)
    names = [path.relative_to(whole) for path in files(whole / f'checkpoints/step_{step}')]
    assert {'metrics.jsonl', 'steps.f32', SEAL} < {name.name for name in names}
    for name in names:
        folder = tmp_path / 'damaged run'
        shutil.copytree(whole, folder)
        damage(folder / name)
        aside, resumed = run(folder)
        assert f'the checkpoint of step {step} cannot be used ({name.name}' in aside.replace(
            '(' + '/'.join(name.parts[2:]), '(' + name.name
        )
        assert resumed == f'resumed at {start}'
        assert list(folder.glob(f'damaged/step_{step}_*'))
        assert end(folder)[0] == undisturbed[0]
        shutil.rmtree(folder)


def altered(path):
    write_json(path, read_json(path) | {'data': {'train': {'fingerprint': 'other'}}})


def test_a_checkpoint_of_another_version_is_refused_and_left_where_it_is(tmp_path):
    run(tmp_path, last=4)
    for place in (tmp_path / 'checkpoints').iterdir():
        seal_folder(place, read_sealed_folder(place) | {'format': checkpoint.SLIM + 1})
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match='another version of cnn_jax'):
        run(tmp_path)
    with pytest.raises(UserError, match='another version of cnn_jax'):
        Checkpoints(tmp_path / 'checkpoints', CONFIG).restore(4, state_at(0))
    assert sorted(tmp_path.rglob('*')) == before


def test_without_any_good_checkpoint_it_does_not_start_from_zero(tmp_path):
    run(tmp_path, last=4)
    for place in (tmp_path / 'checkpoints').iterdir():
        cut(max(files(place), key=lambda path: path.stat().st_size))
    for _ in range(2):  # nothing was moved by the first attempt
        with pytest.raises(UserError, match=r'no checkpoint .* can be used \(step 4: .* damaged'):
            run(tmp_path)


@pytest.mark.parametrize('damage', [cut, flip, remove, lambda path: path.write_text('[1]\n{"a"')])
@pytest.mark.parametrize('name', ['metrics.jsonl', 'steps.f32'])
def test_a_damaged_record_is_restored_from_the_checkpoint(tmp_path, undisturbed, name, damage):
    run(tmp_path, last=7)
    damage(tmp_path / name)
    damaged, resumed = run(tmp_path)
    assert damaged == f'{tmp_path / name} was damaged and is restored'
    assert resumed == 'resumed at 6'
    assert end(tmp_path) == undisturbed


@pytest.mark.parametrize('damage', [cut, flip, remove, lambda path: path.write_text('[1]\n{"a"')])
def test_damaged_timings_cost_nothing_but_themselves(tmp_path, undisturbed, damage):
    run(tmp_path, last=7)
    damage(tmp_path / 'timing.jsonl')
    assert run(tmp_path)[-1] == 'resumed at 6'
    assert end(tmp_path)[0][:2] == undisturbed[0][:2]


def test_the_latest_and_the_best_are_what_remains(tmp_path):
    run(tmp_path)
    checkpoints = Checkpoints(tmp_path / 'checkpoints', CONFIG)
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([8, 6, 4], 8, 4)


@pytest.mark.parametrize('damage', [flip_largest, shutil.rmtree, lambda at: remove(at / SEAL)])
def test_no_other_takes_the_place_of_the_best_or_the_newest(tmp_path, damage):
    run(tmp_path)
    checkpoints = Checkpoints(tmp_path / 'checkpoints', CONFIG)
    damage(checkpoints.place(4))
    assert checkpoints.best() == 4
    with pytest.raises(UserError, match='the latest'):
        checkpoints.restore(4, state_at(0))
    run(tmp_path)  # which puts the damaged one aside
    assert (checkpoints.latest(), checkpoints.best()) == (8, 4)
    if damage is not shutil.rmtree:
        damage(checkpoints.place(8))
        for read in (checkpoints.best, lambda: checkpoints.restore(8, state_at(0))):
            with pytest.raises(UserError, match='rerun'):
                read()


@pytest.mark.parametrize('damage', [cut, flip, remove, altered])
def test_the_manifest_is_the_one_of_the_checkpoints(tmp_path, undisturbed, damage):
    run(tmp_path, last=7)
    path, before = tmp_path / 'manifest.json', sorted(tmp_path.rglob('*'))
    damage(path)
    with pytest.raises(UserError, match=r'copy (\S*/step_\d/manifest.json) to its place') as caught:
        run(tmp_path)
    assert sorted(tmp_path.rglob('*')) in (before, [file for file in before if file != path])
    shutil.copy(str(caught.value).split(' copy ')[1].split()[0], path)
    assert run(tmp_path) == ['resumed at 6']
    assert end(tmp_path) == undisturbed


def test_a_run_without_checkpoints_has_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'none', CONFIG)
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    assert checkpoints.resumable(print) is None


@pytest.mark.parametrize(
    'change', [{'params': {'conv': {}}}, {'averaged': {'kernel': jnp.zeros(2)}}]
)
def test_a_state_of_another_structure_is_a_usage_error(tmp_path, change):
    run(tmp_path, last=2)
    other = dataclasses.replace(state_at(0), **change)
    with pytest.raises(UserError, match='step 2'):
        Checkpoints(tmp_path / 'checkpoints', CONFIG).restore(2, other)


def frozen(number=0.0):
    """What a file of weights brings."""
    return {'backbone/kernel': np.arange(50_000, dtype=np.float32) + number}


def fine_tuned(step):
    state = state_at(step)
    return dataclasses.replace(state, params=state.params | params.unflatten(frozen()))


def test_frozen_weights_are_not_in_a_checkpoint_and_come_back_with_it(tmp_path):
    slim = Checkpoints(tmp_path / 'slim', CONFIG, frozen=frozen)
    whole = Checkpoints(tmp_path / 'whole', CONFIG)
    for each in (slim, whole):
        each.save(fine_tuned(2), {'sums': 1})
        state, progress = each.restore(2, fine_tuned(0))
        assert digest(state) == digest(fine_tuned(2))
        assert progress == {'sums': 1}
    small, large = (sum(p.stat().st_size for p in files(c.place(2))) for c in (slim, whole))
    assert small < 20_000 < large
    # A checkpoint of before, read by one that would leave them out.
    old = Checkpoints(tmp_path / 'whole', CONFIG, frozen=frozen)
    assert digest(old.restore(2, fine_tuned(0))[0]) == digest(fine_tuned(2))


@pytest.mark.parametrize(
    'now',
    [
        dict,
        lambda: frozen(1.0),
        lambda: {'backbone/kernel': frozen()['backbone/kernel'].astype(np.float16)},
        lambda: {'backbone/bias': frozen()['backbone/kernel']},
    ],
)
def test_other_frozen_weights_than_those_of_the_run_are_refused(tmp_path, now):
    Checkpoints(tmp_path / 'c', CONFIG, frozen=frozen).save(fine_tuned(2), {})
    with pytest.raises(UserError, match='frozen weights'):
        Checkpoints(tmp_path / 'c', CONFIG, frozen=now).restore(2, fine_tuned(0))


def test_steps_and_metrics_are_recorded_bit_for_bit(tmp_path):
    run(tmp_path)
    steps = np.arange(1, END + 1)
    expected = np.stack([1 / steps, np.full(END, 1 / 3)], 1).astype('<f4')
    np.testing.assert_array_equal(read_steps(tmp_path), expected)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['loss'] for line in lines] == [1 / step for step in range(2, END + 1, 2)]
