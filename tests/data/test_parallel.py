import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax.data.decode import CHUNK, parallel_map
from cnn_jax.runtime import cores


@given(st.integers(0, 5 * CHUNK))
def test_results_come_in_order(n):
    assert parallel_map(lambda i: i * i, n, '') == [i * i for i in range(n)]


def test_the_first_error_ends_the_work():
    done = []

    def work(i):
        if i == 3:
            raise KeyError('three')
        time.sleep(0.001)
        done.append(i)

    with pytest.raises(KeyError, match='three'):
        parallel_map(work, 100 * cores() * CHUNK, '')
    assert len(done) < 10 * cores() * CHUNK


def test_the_work_is_shared():
    both_here = threading.Barrier(min(2, cores()), timeout=10)
    parallel_map(lambda i: both_here.wait() if i % CHUNK == 0 else None, 2 * CHUNK, '')


def test_a_terminal_sees_progress(monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    assert parallel_map(lambda i: i, 100, 'Decoding images') == list(range(100))
    assert 'Decoding images' in capsys.readouterr().err
