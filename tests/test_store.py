"""Rows by key: right whatever was there before, whoever writes, whatever was damaged or killed."""

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax import store
from cnn_jax.errors import UserError
from cnn_jax.store import Store
from tests.damage import copied_before_each_operation, damaged

PER_FILE = 4
SHAPE = (2, 3)
wanted = st.lists(st.integers(0, 20), min_size=1, max_size=12)


def key(number):
    return sha256(b'%d' % number).digest()


def row(number):
    return np.full(SHAPE, number, np.float32)


def rows(folder, numbers, share=(0, 1)):
    """What a store returns for some numbers, checked, and the numbers that were computed."""
    computed = []

    def fill(positions, out):
        assert len(positions) == len(out) <= PER_FILE
        for place, position in enumerate(positions):
            computed.append(numbers[position])
            out[place] = row(numbers[position])

    kept = Store(folder, SHAPE, np.float32, PER_FILE, 'numbers')
    found = kept.rows([*map(key, numbers)], fill, '', share)
    assert (len(found), found.shape, found.nbytes) == (len(numbers), SHAPE, 24 * len(numbers))
    np.testing.assert_array_equal(found[np.arange(len(numbers))], [*map(row, numbers)])
    return computed


def files(folder):
    return sorted(path for path in folder.iterdir())


@settings(max_examples=60)
@given(requests=st.lists(wanted, min_size=1, max_size=6))
def test_each_row_is_computed_once(tmp_path, requests):
    folder, known = tmp_path / 'store', set()
    shutil.rmtree(folder, ignore_errors=True)
    for numbers in requests:
        assert sorted(rows(folder, numbers)) == sorted({*numbers} - known)
        known |= {*numbers}


@settings(max_examples=100)
@given(data=st.data(), numbers=wanted)
def test_what_is_damaged_is_computed_again_and_nothing_else(tmp_path, data, numbers):
    folder = tmp_path / 'store'
    shutil.rmtree(folder, ignore_errors=True)
    rows(folder, [*range(10)])
    path = data.draw(st.sampled_from(files(folder)))
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(whole)))
    else:
        path.unlink()
    hit = (path.exists() and path.read_bytes() != whole) or not path.exists()
    computed = rows(folder, numbers)
    assert len({*computed}) == len(computed) <= hit * PER_FILE + len({*numbers} - {*range(10)})
    assert rows(folder, numbers) == []


def test_killed_before_any_file_operation_the_store_is_of_use(tmp_path):
    folder, copies = tmp_path / 'store', tmp_path / 'copies'
    rows(folder, [0, 1])
    with copied_before_each_operation(folder, copies):
        rows(folder, [*range(11)])
    left = files(copies)
    assert len(left) > 10
    for place in left:
        assert {0, 1}.isdisjoint(rows(place, [*range(11)]))
        assert rows(place, [*range(11)]) == []


def test_several_processes_may_write_at_once(tmp_path):
    folder = tmp_path / 'store'
    requests = [[*range(start, start + 30)] for start in (0, 10, 20, 5)]
    with ProcessPoolExecutor(4, multiprocessing.get_context('spawn')) as pool:
        done = [pool.submit(rows, folder, r, (i, 4)) for i, r in enumerate(requests)]
        for each in done:
            each.result()
    assert rows(folder, [*range(50)]) == []


def test_what_was_unused_for_longest_is_removed_first_and_nothing_in_use(tmp_path, monkeypatch):
    numbers = [*range(8)]
    for name, age in (('b', 20), ('c', 10), ('a', 30), ('d', 40)):
        rows(tmp_path / name, numbers)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    for name in 'abc':  # as if the processes that used them had ended
        os.close(store._used.pop(tmp_path / name))
    listed = store.entries(tmp_path)
    assert [entry.folder.name for entry in listed] == ['c', 'b', 'a', 'd']
    assert {(entry.rows, entry.about) for entry in listed} == {(8, 'numbers')}
    each = listed[0].nbytes
    assert store.remove_oldest(tmp_path, 4 * each) == []
    assert [gone.name for gone in store.remove_oldest(tmp_path, 2.5 * each)] == ['a', 'b']
    monkeypatch.setenv('CNN_JAX_CACHE_GB', '0')
    assert rows(tmp_path / 'e', numbers) == numbers  # which removes the last but those in use
    assert sorted(entry.folder.name for entry in store.entries(tmp_path)) == ['d', 'e']
    assert rows(tmp_path / 'c', numbers) == numbers
    monkeypatch.setenv('CNN_JAX_CACHE_GB', 'much')
    with pytest.raises(UserError, match='CNN_JAX_CACHE_GB'):
        store.limit()


@pytest.mark.filterwarnings('ignore:nothing is cached')  # which is told once in a process
@pytest.mark.parametrize('numbers', [[3], [*range(11)]])
def test_without_a_folder_that_can_be_written_rows_are_kept_in_memory(tmp_path, numbers):
    (tmp_path / 'store').write_text('a file')
    assert rows(tmp_path / 'store', numbers) == numbers
