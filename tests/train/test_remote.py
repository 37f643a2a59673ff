"""Work directories in object stores: what goes up comes back, whatever breaks off where."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cnn_jax.errors import RunFailed, UserError
from cnn_jax.files import read_sealed_folder, seal_folder
from cnn_jax.train import remote

ROOT = Path(__file__).resolve().parents[2]
URL = 'faulty://bucket/run'
RECORD = 'metrics.jsonl', 'steps.f32'


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Faulty(MemoryFileSystem):
    """A store in memory in which the next file operations can be made to fail."""

    protocol = 'faulty'
    store, pseudo_dirs = {}, ['']  # not the one of memory://
    faults: Any = iter(())

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('faulty://'))


def _may_fail(name):
    real = getattr(MemoryFileSystem, name)

    def operation(self, *args, **kwargs):
        if fault := next(type(self).faults, None):
            raise fault
        return real(self, *args, **kwargs)

    return operation


for name in ('find', 'cat_file', 'pipe_file', 'put_file', 'get_file', 'rm_file'):
    setattr(Faulty, name, _may_fail(name))
fsspec.register_implementation('faulty', Faulty)


@pytest.fixture(autouse=True)
def empty_stores():
    for store in (Faulty, MemoryFileSystem):
        store.store.clear()
        store.pseudo_dirs[:] = ['']
    Faulty.faults = iter(())


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a process on some machine, whose cache is its own; with its mirror of a URL."""

    def make(name, url=URL):
        monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / name))
        return remote.Mirror(url)

    return make


def begin(at):
    at.resume()
    at.take()
    return at


def survives(action, operations):
    """Kill an action before one of its operations on the store; whether it came to its end."""
    Faulty.faults = itertools.chain([None] * operations, [Killed()])
    try:
        action()
    except Killed:
        return False
    finally:
        Faulty.faults = iter(())
    return True


def train(at, steps, keep=2, run='a'):
    """Write what a run writes by the way to some steps, each with a checkpoint."""
    folder = at.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(f'{{"run": "{run}"}}')
    for step in steps:
        record = {'metrics.jsonl': f'{run} to {step}\n', 'steps.f32': f'{run:8}' * step}
        place = folder / f'checkpoints/step_{step}'
        (place / 'state/d').mkdir(parents=True)
        (place / 'state/d' / os.urandom(4).hex()).write_text(f'{run} state {step}')
        (place / '_METADATA').write_text(f'saved at {time.time_ns()}')
        for name, text in record.items():
            (folder / name).write_text(text)
            (place / name).write_text(text)
        seal_folder(place, {'progress': {}})
        for old in steps_in(folder)[:-keep]:
            shutil.rmtree(folder / f'checkpoints/step_{old}')
    return at


def uploaded(machine, steps=(10, 20), keep=2, run='a'):
    """A mirror whose remote folder holds all of a run."""
    at = train(begin(machine('first')), steps, keep, run)
    at.push(last=True)
    return at


def steps_in(folder):
    return sorted(int(path.parent.name[5:]) for path in folder.glob('checkpoints/*/seal.json'))


def resumes_at(folder):
    """The step from which a run in a folder resumes, as `Checkpoints.resumable` finds it."""
    step = max(steps_in(folder), default=None)
    if step is not None:
        read_sealed_folder(folder / f'checkpoints/step_{step}')
    return step


def content(folder):
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize('scheme', ['memory', 'file'])
def test_what_goes_up_comes_back(machine, tmp_path, scheme):
    url = f'{scheme}://{tmp_path}/remote/'
    here = begin(machine('here', url))
    for step in (1, 2, 10, 20):
        train(here, [step]).push()
    (here.folder / 'curves.png').write_bytes(b'curves')
    (here.folder / 'checkpoints/saving').mkdir()
    (here.folder / 'checkpoints/saving/half').write_text('half')
    here.push(last=True)
    elsewhere = begin(machine('elsewhere', url))
    shutil.rmtree(here.folder / 'checkpoints/saving')
    assert content(elsewhere.folder) == content(here.folder)
    assert steps_in(elsewhere.folder) == [10, 20]


@pytest.mark.parametrize('keep', [1, 2])
def test_an_upload_killed_anywhere_leaves_a_checkpoint_to_resume_from(machine, keep):
    seen, finished = set(), False
    for operations in itertools.count():
        Faulty.store.clear()
        first = train(uploaded(machine, (10, 20), keep), [30], keep)
        finished = survives(first.push, operations)
        seen.add(resumes_at(begin(machine(f'{keep} {operations}')).folder))
        again = begin(machine('first'))  # on the machine itself, whose process was killed
        assert resumes_at(again.folder) == 30
        again.push(last=True)
        third = begin(machine(f'{keep} {operations} again'))
        assert content(third.folder) == content(again.folder)
        shutil.rmtree(again.base)
        if finished:
            break
    assert seen == {20, 30}
    assert operations > 8


def test_a_download_killed_anywhere_is_made_again(machine):
    there = uploaded(machine)
    for operations in itertools.count():
        at = train(machine(f'machine {operations}'), [10])
        if survives(lambda at=at: begin(at), operations):
            break
        assert resumes_at(at.folder) in (10, 20)
        again = begin(machine(f'machine {operations}'))
        assert content(again.folder) == content(there.folder)
    assert operations > 8


def test_who_is_farther_is_taken(machine, capsys):
    first = uploaded(machine, [10])
    second = train(begin(machine('second')), [20])
    second.push(last=True)
    (first.folder / 'old').write_text('old')
    begin(first)
    assert content(first.folder) == content(second.folder)
    before = content(train(first, [30]).folder)
    begin(first)
    assert content(first.folder) == before
    assert 'which is farther than faulty://bucket/run' in capsys.readouterr().out
    first.push(last=True)
    assert content(begin(machine('third')).folder) == before


@pytest.mark.parametrize('lost', ['seal.json', '_METADATA'])
def test_half_a_checkpoint_is_never_taken_for_a_whole_one(machine, lost):
    first = train(uploaded(machine, [10]), [20])
    first.push(last=True)
    del Faulty.store[f'/bucket/run/checkpoints/step_20/{lost}']
    shutil.rmtree(first.folder)
    before = content(train(first, [10]).folder)
    again = begin(machine('first'))
    assert content(again.folder) == before
    train(again, [20]).push(last=True)
    assert resumes_at(begin(machine('second')).folder) == 20


def test_two_machines_that_saved_the_same_steps_do_not_mix_their_files(machine):
    first = train(uploaded(machine, [10]), [20], keep=1)
    train(begin(machine('second')), [20], keep=1).push(last=True)
    train(begin(first), [30], keep=2).push(last=True)
    third = begin(machine('third'))
    assert (steps_in(third.folder), resumes_at(third.folder)) == ([20, 30], 30)
    assert read_sealed_folder(third.folder / 'checkpoints/step_20')


@pytest.mark.parametrize('steps', [[10], [20], [20, 30]])
def test_another_run_is_not_mixed_with_that_in_the_cache(machine, steps):
    at = uploaded(machine, [20])
    shutil.rmtree(at.folder)
    train(at, steps, run='b')
    if max(steps) < 20:  # nothing of it is needed
        assert (begin(at).folder / 'config.json').read_text() == '{"run": "a"}'
        return
    with pytest.raises(UserError, match='hold different runs'):
        begin(at)


def test_a_failed_upload_is_told_and_made_again_with_the_next_checkpoint(machine, capsys):
    at = train(uploaded(machine, [10]), [20])
    Faulty.faults = itertools.chain([None] * 3, [OSError('the network is down\nfor long')])
    at.push()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f'warning: {URL} cannot be written (the network is down)')
    train(at, [30]).push()
    assert not capsys.readouterr().err
    assert content(begin(machine('second')).folder) == content(at.folder)
    Faulty.faults = itertools.repeat(TimeoutError())
    with pytest.raises(RunFailed, match='same command'):
        at.push(last=True)


@pytest.mark.parametrize('name', ['/tmp/x', '../x', 'a/../../x', './x', 'checkpoints/step_1//x'])
def test_no_file_is_written_outside_the_folder(machine, monkeypatch, name):
    at, find = uploaded(machine), Faulty.find
    monkeypatch.setattr(Faulty, 'find', lambda *a, **k: [*find(*a, **k), f'/bucket/run/{name}'])
    for read in (lambda: remote.fetch_workdir(URL), lambda: begin(at)):
        with pytest.raises(UserError, match='of the name'):
            read()


@pytest.mark.parametrize('operations', [0, 1])  # listing the bucket, and writing to it
def test_a_store_that_cannot_be_used_is_a_usage_error(machine, monkeypatch, operations):
    Faulty.faults = itertools.chain([None] * operations, [PermissionError('403 forbidden')])
    with pytest.raises(UserError, match='403 forbidden'):
        begin(machine('first'))
    fsspec.filesystem('faulty').pipe('/bucket/run/thesis.tex', b'by hand')
    with pytest.raises(UserError, match='holds other files'):
        begin(machine('first'))
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    for url, word in (('gs://bucket/run', r'requirements-gcs\.txt'), ('sg://bucket/run', 'sg')):
        with pytest.raises(UserError, match=word):
            machine('first', url)


def test_who_starts_last_owns_the_remote_folder(machine):
    first, second = uploaded(machine), machine('second')
    second.resume()  # which may be refused yet, as the run of another config
    first.push(last=True)
    second.take()
    before = dict(Faulty.store)
    train(first, [30])
    for last in (False, True):
        with pytest.raises(RunFailed, match='has begun to train'):
            first.push(last)
    assert Faulty.store == before
    second.push(last=True)


def test_readers_see_what_is_there_now_and_may_add_to_it(machine, monkeypatch, tmp_path):
    at = uploaded(machine)
    folder = remote.fetch_workdir(URL)
    assert folder != at.folder
    assert content(folder) == content(at.folder)
    (train(at, [30]).folder / 'checkpoints/step_30/seal.json').rename(at.folder / 'seal')
    at.push(last=True)  # as an upload that goes on
    assert steps_in(remote.fetch_workdir(URL)) == [20]
    (at.folder / 'seal').rename(at.folder / 'checkpoints/step_30/seal.json')
    at.push(last=True)
    (folder / 'checkpoints/step_20/_METADATA').write_text('damaged')
    (folder / 'evaluation.json').write_text('{}')
    remote.upload(URL, ['evaluation.json'])
    assert resumes_at(remote.fetch_workdir(URL)) == 30
    assert read_sealed_folder(folder / 'checkpoints/step_20')
    assert (folder / 'evaluation.json').read_text() == '{}'
    real = Faulty.get_file

    def removed_meanwhile(self, path, *args, **kwargs):
        if 'step_20' in path:
            self.store.pop(path, None)
        return real(self, path, *args, **kwargs)

    shutil.rmtree(folder)
    monkeypatch.setattr(Faulty, 'get_file', removed_meanwhile)
    assert steps_in(remote.fetch_workdir(URL)) == [30]
    Faulty.store.clear()
    with pytest.raises(UserError, match='there is no run at'):
        remote.fetch_workdir(URL)
    assert remote.fetch_workdir(f'{tmp_path}/run') == tmp_path / 'run'  # of this machine


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_the_same_bits(tmp_path):
    """Stopped by SIGTERM; the machine is lost; the same command ends with the same record."""

    def command(name, cache, *arguments):
        environment = os.environ | {'CNN_JAX_CACHE': str(tmp_path / cache)}
        line = [sys.executable, '-m', f'launch.{name}', *arguments]
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def ended(process):
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    sizes = '--config.model.widths=(4,)', '--config.model.hidden=(16,)', '--config.train.epochs=20'
    flags = '--config=experiments/small.py', '--config.data.source=digits', *sizes
    flags += ('--config.augment.crop=0',)
    remote, url = tmp_path / 'remote', f'--workdir=file://{tmp_path}/remote'
    undisturbed = command('train', 'other', *flags, f'--workdir={tmp_path}/local')
    first, deadline = command('train', 'lost', *flags, url), time.monotonic() + 120
    while not list(remote.glob('checkpoints/*/seal.json')) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert ended(first)[0] == os.EX_TEMPFAIL
    shutil.rmtree(tmp_path / 'lost')
    for process in (command('train', 'new', *flags, url), undisturbed):
        assert ended(process)[0] == 0
    for name in RECORD:
        assert (remote / name).read_bytes() == (tmp_path / 'local' / name).read_bytes()
    names = {path.name for path in remote.iterdir()} - {'writer.json'}
    assert {'curves.png', 'speed.json', 'manifest.json', 'checkpoints'} <= names
    assert ended(command('evaluate', 'third', url))[0] == 0
    evaluation = json.loads((remote / 'evaluation.json').read_text())
    last = json.loads((remote / 'metrics.jsonl').read_text().splitlines()[-1])
    assert evaluation['step'] == last['step']
    assert evaluation['loss'] == pytest.approx(last['loss'])
