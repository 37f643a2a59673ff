"""Work directories in object stores: what goes up comes back, whatever breaks off where."""

import itertools
import os
import shutil
import sys
import time
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cnn_jax.errors import RunFailed, UserError
from cnn_jax.files import read_sealed_folder, seal_folder
from cnn_jax.train import remote
from cnn_jax.train.fit import fit
from cnn_jax.train.run import load_run

URL = 'faulty://bucket/run'


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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a process on some machine, whose cache is its own; with its mirror of a URL."""
    for store in (Faulty, MemoryFileSystem):
        store.store.clear()
        store.pseudo_dirs[:] = ['']
    Faulty.faults = iter(())

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
    for step in steps:
        place = at.folder / f'checkpoints/step_{step}'
        (place / 'state/d').mkdir(parents=True)
        (place / 'state/d' / os.urandom(4).hex()).write_text(f'{run} state {step}')
        (place / '_METADATA').write_text(f'saved at {time.time_ns()}')
        (at.folder / 'config.json').write_text(f'{{"run": "{run}"}}')
        for folder in (at.folder, place):
            (folder / 'metrics.jsonl').write_text(f'{run} to {step}\n')
            (folder / 'steps.f32').write_text(f'{run:8}' * step)
        seal_folder(place, {'progress': {}})
        (at.folder / 'checkpoints/saving').mkdir(exist_ok=True)
        (at.folder / 'checkpoints/saving/half').write_text('is not uploaded')
        for old in steps_in(at)[:-keep]:
            shutil.rmtree(at.folder / f'checkpoints/step_{old}')
    return at


def uploaded(machine, steps=(10, 20), keep=2):
    """A mirror whose remote folder holds all of a run."""
    at = train(begin(machine('first')), steps, keep)
    at.push(last=True)
    return at


def steps_in(at):
    return sorted(int(path.parent.name[5:]) for path in at.folder.glob('checkpoints/*/seal.json'))


def resumes_at(at):
    """The step from which a run resumes, as `Checkpoints.resumable` finds it."""
    step = max(steps_in(at), default=None)
    if step is not None:
        read_sealed_folder(at.folder / f'checkpoints/step_{step}')
    return step


def content(at):
    paths = [path for path in at.folder.rglob('*') if path.is_file() and path.name != 'half']
    return {path.relative_to(at.folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize('keep', [1, 2])
def test_killed_anywhere_it_leaves_a_checkpoint_to_resume_from(machine, keep):
    seen, finished = set(), False
    for operations in itertools.count():
        Faulty.store.clear()
        first = train(uploaded(machine, (10, 20), keep), [30], keep)
        finished = survives(first.push, operations)
        second = train(machine(f'{keep} {operations}'), [10])
        finished = survives(lambda at=second: begin(at), operations) and finished
        assert resumes_at(second) in (10, 20, 30)
        seen.add(resumes_at(begin(second)))
        assert not (second.folder / 'checkpoints/saving').exists()
        again = begin(machine('first'))  # on the machine itself, whose process was killed
        assert resumes_at(again) == 30
        again.push(last=True)
        assert content(begin(machine(f'{keep} {operations} again'))) == content(again)
        shutil.rmtree(again.base)
        if finished:
            break
    assert seen == {20, 30}
    assert operations > 8


def test_who_is_farther_is_taken_and_the_files_of_two_machines_do_not_mix(machine, capsys):
    first = uploaded(machine, [10])
    second = train(begin(machine('second')), [20], keep=1)
    second.push(last=True)
    (train(first, [20], keep=1).folder / 'own').write_text('of this machine')
    assert 'own' in content(begin(first))  # neither is farther
    train(first, [30]).push(last=True)
    assert steps_in(begin(second)) == [20, 30]
    for step in (20, 30):
        read_sealed_folder(second.folder / f'checkpoints/step_{step}')
    before = content(train(second, [40]))
    assert content(begin(second)) == before
    assert 'which is farther than faulty://bucket/run' in capsys.readouterr().out
    second.push(last=True)
    assert content(begin(machine('third'))) == before


@pytest.mark.parametrize('lost', ['seal.json', '_METADATA'])
def test_half_a_checkpoint_is_never_taken_for_a_whole_one(machine, lost):
    first = train(uploaded(machine, [10]), [20])
    first.push(last=True)
    del Faulty.store[f'/bucket/run/checkpoints/step_20/{lost}']
    shutil.rmtree(first.folder)
    before = content(train(first, [10]))
    again = begin(machine('first'))
    assert content(again) == before
    train(again, [20]).push(last=True)
    assert resumes_at(begin(machine('second'))) == 20


@pytest.mark.parametrize('steps', [[10], [20], [20, 30]])
def test_another_run_is_not_mixed_with_that_in_the_cache(machine, steps):
    at = uploaded(machine, [20])
    shutil.rmtree(at.folder)
    train(at, steps, run='b')
    if max(steps) < 20:  # nothing of it is needed
        assert content(begin(at))['config.json'] == b'{"run": "a"}'
        return
    with pytest.raises(UserError, match='hold different runs'):
        begin(at)


def test_a_failed_upload_is_printed_and_made_again_with_the_next_checkpoint(machine, capsys):
    at = train(uploaded(machine, [10]), [20])
    Faulty.faults = itertools.chain([None] * 3, [OSError('the network is down\nfor long')])
    at.push()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f'warning: {URL} cannot be written (the network is down)')
    train(at, [30]).push()
    assert not capsys.readouterr().err
    assert content(begin(machine('second'))) == content(at)
    Faulty.faults = itertools.repeat(TimeoutError())
    with pytest.raises(RunFailed, match='same command'):
        at.push(last=True)


@pytest.mark.parametrize(
    'name', ['/tmp/x', '../x', 'a/../../x', './x', 'a\0', 'checkpoints/step_1//x']
)
def test_no_file_is_written_outside_the_folder(machine, monkeypatch, name):
    at, find = uploaded(machine), Faulty.find
    monkeypatch.setattr(Faulty, 'find', lambda *a, **k: [*find(*a, **k), f'/bucket/run/{name}'])
    for read in (lambda: remote.fetch_workdir(URL), lambda: begin(at)):
        with pytest.raises(UserError, match='a file named'):
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


class HttpError(Exception):
    code = 503


@pytest.mark.parametrize('error', [ConnectionResetError(), TimeoutError(), HttpError('retry')])
def test_an_outage_is_a_failed_run_which_may_be_restarted(machine, error):
    Faulty.faults = itertools.chain([error])
    with pytest.raises(RunFailed, match=r'cannot be reached.*same command'):
        begin(machine('first'))
    assert begin(machine('first'))


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


def test_readers_see_what_is_there_now_and_may_add_to_it(machine, monkeypatch):
    at, reader = train(uploaded(machine), [30], keep=3), remote.Mirror(URL, 'read')
    (at.folder / 'checkpoints/step_30/seal.json').rename(at.folder / '.seal')
    at.push(last=True)  # as an upload that goes on
    assert remote.fetch_workdir(URL) == reader.folder != at.folder
    assert steps_in(reader) == [10, 20]
    (at.folder / '.seal').rename(at.folder / 'checkpoints/step_30/seal.json')
    at.push(last=True)
    (reader.folder / 'checkpoints/step_20/_METADATA').write_text('damaged')
    (reader.folder / 'evaluation/test').mkdir(parents=True)
    (reader.folder / 'evaluation/test/evaluation.json').write_text('{}')
    remote.upload(URL, ['evaluation/test/evaluation.json'])
    remote.fetch_workdir(URL)
    assert content(reader) == content(at) | {'evaluation/test/evaluation.json': b'{}'}
    real = Faulty.get_file

    def removed_meanwhile(self, path, *args, **kwargs):
        if 'step_10' in path:
            self.store.pop(path, None)
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(Faulty, 'get_file', removed_meanwhile)
    shutil.rmtree(reader.folder)
    remote.fetch_workdir(URL)
    assert steps_in(reader) == [20, 30]
    Faulty.store.clear()
    with pytest.raises(UserError, match='there is no run at'):
        remote.fetch_workdir(URL)


@pytest.mark.parametrize('scheme', ['memory', 'file'])
def test_a_run_is_trained_opened_and_gone_on_with_there(machine, small, tmp_path, scheme):
    config, url = small(train__epochs=2.0), f'{scheme}://{tmp_path}/remote/run'
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1)).astype(np.uint8)
    data, said = (images, np.arange(24) % 3), []
    machine('here')
    run = fit(config, url, train=data, eval=data, say=said.append)
    machine('elsewhere')
    for again in (load_run(url), fit(config, url, train=data, eval=data, say=said.append)):
        assert (again.step, again.metrics['loss']) == (run.step, run.metrics['loss'])
        assert np.array_equal(again.predict(images), run.predict(images))
    for name in ('metrics.jsonl', 'steps.f32', 'curves.png', 'checkpoints/step_6/seal.json'):
        store, path = fsspec.core.url_to_fs(f'{url}/{name}')
        assert (run.folder / name).read_bytes() == store.cat_file(path)
