"""Files appear whole or not at all, and no changed bit goes unnoticed."""

import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cnn_jax import files
from cnn_jax.errors import UserError
from tests.damage import Runs, object_array


def build(path, value=7, calls=None, shape=(3, 4)):
    def fill(array):
        array[...] = value
        if calls is not None:
            calls.append(value)

    return files.cached_array(path, shape, fill)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'own'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert files.cache_folder() == tmp_path / 'own'
    monkeypatch.delenv('CNN_JAX_CACHE')
    assert files.cache_folder() == tmp_path / 'xdg/cnn_jax'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert files.cache_folder() == tmp_path / 'home/.cache/cnn_jax'


@pytest.fixture
def disk(monkeypatch):
    """The changes of files and folders in their order, each sync among them."""
    events = []
    real = {name: getattr(os, name) for name in ('fsync', 'replace')}

    def fsync(descriptor):
        events.append(('sync', os.readlink(f'/proc/self/fd/{descriptor}')))
        real['fsync'](descriptor)

    def replace(old, new):
        events.append(('name', str(new)))
        real['replace'](old, new)

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    return events


def test_file_and_folder_are_on_the_disk_before_a_write_returns(disk, tmp_path):
    path = tmp_path / 'a/b/file'
    files.write_text(path, 'content')
    *made, (first, temporary), (second, named), (third, folder) = disk
    assert made == [('sync', str(tmp_path)), ('sync', str(tmp_path / 'a'))]  # which hold new names
    assert (first, second, third) == ('sync', 'name', 'sync')
    assert os.path.dirname(temporary) == str(path.parent)
    assert (named, folder) == (str(path), str(path.parent))


@pytest.mark.parametrize('umask', [0o022, 0o002, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / 'text', '')
        files.write_text(tmp_path / 'text', 'again')
        build(tmp_path / 'array.npy')
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize('call', ['fsync', 'replace', 'write'])
def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, call):
    path = tmp_path / 'file'
    files.write_text(path, 'old')

    def full(*_):
        raise OSError(28, 'No space left on device')

    if call != 'write':
        monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(OSError, match='No space left on device') as caught,
        files.replacing(path) as temporary,
    ):
        (full if call == 'write' else temporary.write_text)('new')
    assert caught.value.filename == str(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {'file': 'old'}


def test_leftovers_of_killed_writers_go_after_a_day(tmp_path):
    old, young = tmp_path / '.old.partial', tmp_path / '.young.partial'
    for path in (old, young):
        path.write_text('')
    os.utime(old, times=(time.time() - 2 * 24 * 3600,) * 2)
    files.write_text(tmp_path / 'file', '')
    assert (old.exists(), young.exists()) == (False, True)


CONTENT = {'accuracy': 0.875, 'names': ['a', 'ü'], 'none': None, 'tiny': 1e-30, '1': [True, -0.0]}


def flips(content):
    """All contents that differ in one bit."""
    for position in range(len(content) * 8):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        yield bytes(changed)


@pytest.mark.parametrize('indent', [None, 2])
def test_any_changed_bit_or_cut_of_a_json_file_is_found_or_changes_nothing(tmp_path, indent):
    path, found = tmp_path / 'a.json', 0
    files.write_json(path, CONTENT, indent)
    whole = path.read_bytes()
    assert files.read_json(path) == CONTENT
    changes = [*flips(whole), *(whole[:size] for size in range(len(whole) - 1)), whole + b'0']
    for changed in changes:
        path.write_bytes(changed)
        try:
            assert files.read_json(path) == CONTENT
        except files.Corrupt:
            found += 1
    assert found == len(changes) - 3  # 1E-30, and two digits of \\u00fc written large


def test_what_json_writes_otherwise_keeps_its_digest(tmp_path):
    files.write_json(tmp_path / 'a.json', {'shape': (1, 2), 'by number': {10: 1, 9: 2}})
    content = {'shape': [1, 2], 'by number': {'10': 1, '9': 2}}
    assert files.read_json(tmp_path / 'a.json') == content


def test_what_is_not_what_was_written_is_corrupt(tmp_path):
    path = tmp_path / 'a.json'
    for text in ('', '[1]', '[' * 100_000, '{"sha256": "0"}', '{"a": ', '{}', '1' * 5000, '\x80'):
        path.write_text(text, encoding='latin-1')
        with pytest.raises(files.Corrupt):
            files.read_json(path)


@pytest.mark.parametrize('kind', ['pipe', 'link to a device'])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / 'file'
    if kind == 'pipe':
        os.mkfifo(path)
    else:
        path.symlink_to('/dev/zero')
    for read in (files.read_bytes, files.read_text, files.read_json):
        with pytest.raises(files.Corrupt, match='regular'):
            read(path)
    assert (build(path) == 7).all()
    assert stat.S_ISREG(os.lstat(path).st_mode)  # it was replaced


DAMAGE = {
    'flipped': lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    'cut': lambda data: data[:-5],
    'a few bytes': lambda data: data[:10],
    'empty': lambda data: b'',
}


@pytest.mark.parametrize('damage', [*DAMAGE, 'gone'])
@pytest.mark.parametrize('name', ['a', 'in/b', files.SEAL])
def test_a_sealed_folder_is_whole_or_found_not_to_be(tmp_path, name, damage):
    (tmp_path / 'in').mkdir()
    for path in (tmp_path / 'a', tmp_path / 'in/b'):
        path.write_bytes(os.urandom(100))
    files.seal_folder(tmp_path, {'step': 3})
    assert files.read_sealed_folder(tmp_path) == {'step': 3}
    path = tmp_path / name
    if damage == 'gone':
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(files.Corrupt, match=name):
        files.read_sealed_folder(tmp_path)


def test_all_of_a_folder_is_on_the_disk_before_its_seal(disk, tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/file').write_text('content')
    files.seal_folder(tmp_path, {})
    before = [path for kind, path in disk[: disk.index(('name', str(tmp_path / files.SEAL)))]]
    assert {str(tmp_path), str(tmp_path / 'in'), str(tmp_path / 'in/file')} < set(before)


def test_an_array_is_built_once_and_then_mapped(tmp_path):
    calls = []
    for value in (7, 8):
        array = build(tmp_path / 'deep/er/a.npy', value, calls)
        assert (array == 7).all()
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert calls == [7]
    assert build(tmp_path / 'deep/er/a.npy', shape=(4, 3)).shape == (4, 3)


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_array_is_built_again(tmp_path, damage):
    path, calls = tmp_path / 'a.npy', []
    build(path, 7)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert (build(path, 8, calls) == 8).all()
    assert (build(path, 9, calls) == 8).all()
    assert calls == [8]


@pytest.mark.parametrize('form', [pickle.dumps, object_array])
def test_a_pickle_in_the_cache_runs_nothing(tmp_path, form):
    path, ran = tmp_path / 'a.npy', tmp_path / 'ran'
    content = form(Runs(ran))
    path.write_bytes(content + bytes.fromhex(files.digest(content)))
    assert (build(path, 7) == 7).all()
    assert not ran.exists()


def test_an_error_while_building_leaves_nothing(tmp_path):
    def fail(array):
        raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        files.cached_array(tmp_path / 'a.npy', (2,), fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('cause', ['no folder', 'full disk'])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, cause):
    def full(*_):
        raise OSError(28, 'No space left on device')

    (tmp_path / 'file').write_text('not a folder')
    if cause == 'full disk':  # an error before the first pixel
        monkeypatch.setattr(os, 'posix_fallocate', full)
    folder = tmp_path / ('file' if cause == 'no folder' else 'folder')
    files._warn_once.cache_clear()
    with pytest.warns(UserWarning, match='nothing is cached'):
        assert (build(folder / 'a.npy') == 7).all()
    assert not folder.is_dir() or list(folder.iterdir()) == []


def test_many_threads_at_once(tmp_path):
    barrier, results = threading.Barrier(8), []

    def work():
        barrier.wait()
        results.append(build(tmp_path / 'a.npy', shape=(300, 300)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all((array == 7).all() for array in results)
    assert [path.name for path in tmp_path.iterdir()] == ['a.npy']


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / 'lock'
    script = (
        'import pathlib, sys, time\n'
        'from cnn_jax import files\n'
        'with files.lock(pathlib.Path(sys.argv[1])) as held:\n'
        '    print(held, flush=True)\n'
        '    time.sleep(60)\n'
    )
    command = [sys.executable, '-c', script, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'True\n'
    with files.lock(path) as held:
        assert not held
    holder = files.lock_holder(path)
    assert holder is not None
    assert holder[1] == process.pid
    process.kill()
    process.wait()
    assert files.lock_holder(path) is None
    with files.lock(path, wait=True) as held:
        assert held
        assert json.loads(path.read_text())[1] == os.getpid()
    assert files.lock_holder(path) is None


@pytest.mark.parametrize('kind', ['pipe', 'link', 'dangling link'])
def test_a_lock_is_no_way_to_another_file(tmp_path, kind):
    path, other = tmp_path / 'lock', tmp_path / 'other'
    if kind == 'pipe':
        os.mkfifo(path)
    else:
        path.symlink_to(other)
        if kind == 'link':
            other.write_text('precious')
    assert files.lock_holder(path) is None
    with pytest.raises(UserError, match='remove it'), files.lock(path, wait=True):
        pass
    assert other.exists() == (kind == 'link')
    assert kind != 'link' or other.read_text() == 'precious'


def test_who_waited_for_a_lock_that_was_removed_locks_the_new_one(tmp_path):
    path, held = tmp_path / 'lock', []

    def wait():
        with files.lock(path, wait=True) as mine:
            held.append((mine, os.stat(path).st_ino))

    with files.lock(path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        path.unlink()
        path.touch()
        number = os.stat(path).st_ino
    waiting.join()
    assert held == [(True, number)]


@pytest.mark.parametrize('text', ['', '[]', '["a"]', '{"a": 1, "b": 2}', '["a", 1e999]', '\xff'])
def test_a_lock_that_tells_nothing_has_no_holder(tmp_path, text):
    (tmp_path / 'lock').write_text(text, encoding='latin-1')
    assert files.lock_holder(tmp_path / 'lock') is None
