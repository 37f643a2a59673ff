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
    faults = iter(())

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('faulty://'))

    def _try(self):
        if fault := next(type(self).faults, None):
            raise fault


def _may_fail(name):
    real = getattr(MemoryFileSystem, name)

    def operation(self, *args, **kwargs):
        self._try()
        return real(self, *args, **kwargs)

    return operation


for name in ('find', 'cat_file', 'pipe_file', 'put_file', 'get_file', 'rm_file'):
    setattr(Faulty, name, _may_fail(name))
fsspec.register_implementation('faulty', Faulty)


def kill_after(operations):
    Faulty.faults = itertools.chain([None] * operations, [Killed()])


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


def train(folder, steps, keep=2, run='a'):
    """Write what a run writes by the way to some steps, each with a checkpoint."""
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


def uploaded(machine, steps=(10, 20), keep=2, run='a'):
    """A mirror whose remote folder holds all of a run."""
    at = machine('first')
    begin(at)
    train(at.folder, steps, keep, run)
    at.push(last=True)
    return at


@pytest.mark.parametrize('scheme', ['memory', 'file'])
def test_what_goes_up_comes_back(machine, tmp_path, scheme):
    url = f'{scheme}://{tmp_path}/remote/'
    here = machine('here', url)
    begin(here)
    for step in (1, 2, 10, 20):
        train(here.folder, [step])
        here.push()
    (here.folder / 'curves.png').write_bytes(b'curves')
    (here.folder / 'checkpoints/saving').mkdir()
    (here.folder / 'checkpoints/saving/half').write_text('half')
    here.push(last=True)
    elsewhere = machine('elsewhere', url)
    begin(elsewhere)
    shutil.rmtree(here.folder / 'checkpoints/saving')
    assert content(elsewhere.folder) == content(here.folder)
    assert steps_in(elsewhere.folder) == [10, 20]


@pytest.mark.parametrize('keep', [1, 2])
def test_an_upload_killed_anywhere_leaves_a_checkpoint_to_resume_from(machine, keep):
    seen = set()
    for operations in itertools.count():
        Faulty.store.clear()
        first = uploaded(machine, (10, 20), keep)
        train(first.folder, [30], keep)
        kill_after(operations)
        try:
            first.push()
        except Killed:
            finished = False
        else:
            finished = True
        Faulty.faults = iter(())
        second = machine(f'{keep} {operations}')
        begin(second)
        seen.add(resumes_at(second.folder))
        # And on the machine itself, whose process was killed.
        again = machine('first')
        begin(again)
        assert resumes_at(again.folder) == 30
        again.push(last=True)
        third = machine(f'{keep} {operations} again')
        begin(third)
        assert content(third.folder) == content(again.folder)
        shutil.rmtree(again.base)
        if finished:
            break
    assert seen == {20, 30}
    assert operations > 8


def test_a_download_killed_anywhere_is_made_again(machine):
    there = uploaded(machine)
    for operations in itertools.count():
        at = machine(f'machine {operations}')
        train(at.folder, [10])
        kill_after(operations)
        try:
            begin(at)
        except Killed:
            assert resumes_at(at.folder) in (10, 20)
        else:
            break
        Faulty.faults = iter(())
        again = machine(f'machine {operations}')
        begin(again)
        assert content(again.folder) == content(there.folder)
    assert operations > 8


def test_the_remote_folder_is_taken_if_it_is_farther(machine):
    first = uploaded(machine, [10])
    second = machine('second')
    begin(second)
    train(second.folder, [20])
    (second.folder / 'new').write_text('new')
    second.push(last=True)
    (first.folder / 'old').write_text('old')
    begin(first)
    assert content(first.folder) == content(second.folder)


def test_the_local_folder_is_taken_if_it_is_farther(machine, capsys):
    first = uploaded(machine, [10])
    train(first.folder, [20])
    before = content(first.folder)
    again = machine('first')
    begin(again)
    assert content(again.folder) == before
    assert 'which is farther than faulty://bucket/run' in capsys.readouterr().out
    again.push(last=True)
    second = machine('second')
    begin(second)
    assert content(second.folder) == before


@pytest.mark.parametrize('lost', ['seal.json', '_METADATA'])
def test_half_a_checkpoint_is_never_taken_for_a_whole_one(machine, lost):
    first = uploaded(machine, [10])
    train(first.folder, [20])
    first.push(last=True)
    del Faulty.store[f'/bucket/run/checkpoints/step_20/{lost}']
    shutil.rmtree(first.folder)
    train(first.folder, [10])
    before = content(first.folder)
    again = machine('first')
    begin(again)
    assert content(again.folder) == before
    train(again.folder, [20])
    again.push(last=True)
    second = machine('second')
    begin(second)
    assert resumes_at(second.folder) == 20


def test_two_machines_that_saved_the_same_steps_do_not_mix_their_files(machine):
    first = uploaded(machine, [10])
    train(first.folder, [20], keep=1)
    second = machine('second')
    begin(second)
    train(second.folder, [20], keep=1)
    second.push(last=True)
    again = machine('first')
    begin(again)
    train(again.folder, [30], keep=2)
    again.push(last=True)
    third = machine('third')
    begin(third)
    assert steps_in(third.folder) == [20, 30]
    assert resumes_at(third.folder) == 30
    assert read_sealed_folder(third.folder / 'checkpoints/step_20')


@pytest.mark.parametrize('steps', [[10], [20], [20, 30]])
def test_another_run_is_not_mixed_with_that_in_the_cache(machine, steps):
    at = uploaded(machine, [20])
    shutil.rmtree(at.folder)
    train(at.folder, steps, run='b')
    if max(steps) < 20:  # nothing of it is needed
        begin(at)
        assert (at.folder / 'config.json').read_text() == '{"run": "a"}'
        return
    with pytest.raises(UserError, match='hold different runs'):
        begin(at)


def test_a_failed_upload_is_printed_and_made_again_with_the_next_checkpoint(machine, capsys):
    at = uploaded(machine, [10])
    train(at.folder, [20])
    Faulty.faults = itertools.chain([None] * 3, [OSError('the network is down\nfor long')])
    at.push()
    warning, *rest = capsys.readouterr().err.splitlines()
    assert not rest
    assert warning.startswith(f'warning: {URL} cannot be written (the network is down)')
    assert str(at.folder) in warning
    train(at.folder, [30])
    at.push()
    assert not capsys.readouterr().err
    second = machine('second')
    begin(second)
    assert content(second.folder) == content(at.folder)
    Faulty.faults = itertools.repeat(TimeoutError())
    with pytest.raises(RunFailed, match=r'TimeoutError.*same command'):
        at.push(last=True)


def test_other_files_are_left_alone(machine):
    fsspec.filesystem('faulty').pipe('/bucket/run/thesis.tex', b'by hand')
    with pytest.raises(UserError, match='holds other files'):
        begin(machine('first'))
    assert list(Faulty.store) == ['/bucket/run/thesis.tex']


@pytest.mark.parametrize('name', ['/tmp/x', '../x', 'a/../../x', './x', 'checkpoints/step_1//x'])
def test_no_file_is_written_outside_the_folder(machine, monkeypatch, name):
    at = uploaded(machine)
    find = Faulty.find
    monkeypatch.setattr(Faulty, 'find', lambda *a, **k: [*find(*a, **k), f'/bucket/run/{name}'])
    with pytest.raises(UserError, match='of the name'):
        remote.fetch_workdir(URL)
    with pytest.raises(UserError, match='of the name'):
        begin(at)


@pytest.mark.parametrize(
    'error', [PermissionError('403 forbidden'), FileNotFoundError('no such bucket')]
)
def test_a_bucket_that_cannot_be_used_is_a_mistake(machine, error):
    for operations in range(2):  # listing it, and writing to it
        Faulty.faults = itertools.chain([None] * operations, [error])
        with pytest.raises(UserError, match=f'{error}.*check the name of the bucket'):
            begin(machine('first'))


def test_who_starts_last_owns_the_remote_folder(machine):
    first = uploaded(machine)
    second = machine('second')
    second.resume()  # which may be refused yet, as the run of another config
    first.push(last=True)
    second.take()
    before = dict(Faulty.store)
    train(first.folder, [30])
    with pytest.raises(RunFailed, match='has begun to train in faulty://bucket/run'):
        first.push()
    with pytest.raises(RunFailed, match='has begun to train in faulty://bucket/run'):
        first.push(last=True)
    assert Faulty.store == before
    second.push(last=True)


def test_a_missing_package_is_named(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    with pytest.raises(UserError, match=r'pip install -r requirements-gcs\.txt'):
        machine('first', 'gs://bucket/run')
    with pytest.raises(UserError, match=r'sg://bucket/run cannot be used .*sg'):
        machine('first', 'sg://bucket/run')


def test_readers_see_what_is_there_now(machine):
    at = uploaded(machine)
    folder = remote.fetch_workdir(URL)
    assert folder != at.folder
    assert content(folder) == content(at.folder)
    train(at.folder, [30])
    (at.folder / 'checkpoints/step_30/seal.json').rename(at.folder / 'seal')
    at.push(last=True)  # as an upload that goes on
    assert steps_in(remote.fetch_workdir(URL)) == [20]
    (at.folder / 'seal').rename(at.folder / 'checkpoints/step_30/seal.json')
    at.push(last=True)
    (folder / 'checkpoints/step_20/_METADATA').write_text('damaged')
    assert remote.fetch_workdir(URL) == folder
    assert resumes_at(folder) == 30
    assert read_sealed_folder(folder / 'checkpoints/step_20')


def test_readers_do_without_a_checkpoint_that_the_run_removes_meanwhile(machine, monkeypatch):
    at = uploaded(machine, (10, 20, 30), keep=3)
    real = Faulty.get_file

    def get_file(self, remote, *args, **kwargs):
        if 'step_10' in remote:
            self.store.pop(remote, None)
        return real(self, remote, *args, **kwargs)

    monkeypatch.setattr(Faulty, 'get_file', get_file)
    assert steps_in(remote.fetch_workdir(URL)) == [20, 30]
    assert steps_in(at.folder) == [10, 20, 30]


def test_what_readers_write_is_uploaded(machine, tmp_path):
    at = uploaded(machine)
    folder = remote.fetch_workdir(URL)
    (folder / 'evaluation.json').write_text('{}')
    remote.upload(URL, ['evaluation.json'])
    at.push(last=True)
    assert fsspec.filesystem('faulty').cat('/bucket/run/evaluation.json') == b'{}'
    Faulty.faults = itertools.repeat(OSError('down'))
    with pytest.raises(UserError, match=r'cannot be used \(down\)'):
        remote.upload(URL, ['evaluation.json'])
    Faulty.faults = iter(())
    Faulty.store.clear()
    with pytest.raises(UserError, match='there is no run at'):
        remote.fetch_workdir(URL)
    assert remote.fetch_workdir(f'{tmp_path}/run') == tmp_path / 'run'  # of this machine
    remote.upload(f'{tmp_path}/run', ['evaluation.json'])


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_the_same_bits(tmp_path):
    """Stopped by SIGTERM; the machine is lost; the same command ends with the same record."""

    def command(name, cache, *arguments):
        environment = os.environ | {'CNN_JAX_CACHE': str(tmp_path / cache)}
        line = [sys.executable, '-m', f'launch.{name}', *arguments]
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    flags = (
        '--config=experiments/small.py',
        '--config.data.source=digits',
        '--config.model.widths=(4,)',
        '--config.model.hidden=(16,)',
        '--config.augment.crop=0',
        '--config.train.epochs=20',
    )
    remote = tmp_path / 'remote'
    url = f'--workdir=file://{remote}'
    undisturbed = command('train', 'other', *flags, f'--workdir={tmp_path}/local')
    first = command('train', 'lost', *flags, url)
    deadline = time.monotonic() + 120
    while not list(remote.glob('checkpoints/*/seal.json')) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == os.EX_TEMPFAIL, said
    shutil.rmtree(tmp_path / 'lost')
    for process in (command('train', 'new', *flags, url), undisturbed):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for name in RECORD:
        assert (remote / name).read_bytes() == (tmp_path / 'local' / name).read_bytes()
    names = {path.name for path in remote.iterdir()} - {'writer.json'}
    assert {'curves.png', 'speed.json', 'manifest.json', 'checkpoints'} <= names
    reader = command('evaluate', 'third', url)
    said, _ = reader.communicate(timeout=300)
    assert reader.returncode == 0, said
    evaluation = json.loads((remote / 'evaluation.json').read_text())
    last = json.loads((remote / 'metrics.jsonl').read_text().splitlines()[-1])
    assert evaluation['step'] == last['step']
    assert evaluation['loss'] == pytest.approx(last['loss'])
