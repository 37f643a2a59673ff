import io
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cnn_jax.cache import cache_folder
from cnn_jax.data import cache


def build(path, value=7, calls=None, shape=(3, 4)):
    def fill(array):
        array[...] = value
        if calls is not None:
            calls.append(value)

    return cache.cached_array(path, shape, fill)


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'own'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert cache_folder() == tmp_path / 'own'
    monkeypatch.delenv('CNN_JAX_CACHE')
    assert cache_folder() == tmp_path / 'xdg/cnn_jax'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_folder() == tmp_path / 'home/.cache/cnn_jax'


def test_an_array_is_built_once_and_then_mapped(tmp_path):
    calls = []
    for value in (7, 8):
        array = build(tmp_path / 'deep/er/a.npy', value, calls)
        assert (array == 7).all()
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert calls == [7]


def test_an_array_of_another_shape_is_built_again(tmp_path):
    build(tmp_path / 'a.npy', shape=(3, 4))
    assert build(tmp_path / 'a.npy', shape=(4, 3)).shape == (4, 3)


DAMAGE = {
    'a changed pixel': lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    'a changed seal': lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    'a cut-off end': lambda data: data[:-5],
    'a few bytes': lambda data: data[:10],
    'nothing': lambda data: b'',
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_is_built_again(tmp_path, damage):
    path = tmp_path / 'a.npy'
    build(path, 7)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    calls = []
    assert (build(path, 8, calls) == 8).all()
    assert (build(path, 9, calls) == 8).all()
    assert calls == [8]


class Runs:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('form', [pickle.dumps, lambda runs: array_bytes(np.array([runs]))])
def test_a_pickle_in_the_cache_runs_nothing(tmp_path, form):
    path, ran = tmp_path / 'a.npy', tmp_path / 'ran'
    cache.write_bytes(path, form(Runs(ran)))  # with a seal that fits
    assert (build(path, 7) == 7).all()
    assert not ran.exists()


def array_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_bytes_are_whole_or_absent(tmp_path):
    path = tmp_path / 'a.json'
    assert cache.read_bytes(path) is None
    cache.write_bytes(path, b'content')
    assert cache.read_bytes(path) == b'content'
    path.write_bytes(b'x' + path.read_bytes())
    assert cache.read_bytes(path) is None


def test_an_error_while_building_leaves_nothing(tmp_path):
    def fail(array):
        raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        cache.cached_array(tmp_path / 'a.npy', (2,), fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.warns(UserWarning, match='what was computed is kept in memory only'):
        array = build(tmp_path / 'file/a.npy')
    assert (array == 7).all()
    with pytest.warns(UserWarning, match='cannot be written'):
        cache.write_bytes(tmp_path / 'file/a.json', b'content')


def test_a_full_disk_is_an_error_before_the_first_pixel(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.warns(UserWarning, match='No space left on device'):
        assert (build(tmp_path / 'a.npy') == 7).all()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_go_after_a_day(tmp_path):
    old, young = tmp_path / 'old.partial', tmp_path / 'young.partial'
    for path in (old, young):
        path.write_text('')
    os.utime(old, times=(time.time() - 2 * 24 * 3600,) * 2)
    build(tmp_path / 'a.npy')
    assert (old.exists(), young.exists()) == (False, True)


def test_many_threads_at_once(tmp_path):
    barrier = threading.Barrier(8)
    results = []

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


def test_two_processes_at_once(tmp_path):
    script = (
        'import pathlib, sys, time\n'
        'from cnn_jax.data import cache\n'
        'def fill(array):\n'
        '    array[...] = 7\n'
        '    time.sleep(0.3)\n'
        'print(cache.cached_array(pathlib.Path(sys.argv[1]), (50, 50), fill).sum())\n'
    )
    command = [sys.executable, '-c', script, str(tmp_path / 'a.npy')]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == [b'17500'] * 2
    assert [path.name for path in tmp_path.iterdir()] == ['a.npy']
