import pytest

from benchmarks import problem
from benchmarks.worker import Worker


def test_a_worker_answers_and_tells_its_memory(tiny, tmp_path):
    problem.write(tiny, tmp_path / 'problem.npz')
    worker = Worker('benchmarks.gemm', tmp_path / 'problem.npz')
    try:
        assert 0 < worker.ask(run=1)['seconds'] < worker.first_step
        assert worker.ask(losses=3)['losses'] == []
        assert worker.version.startswith('jax ')
    finally:
        peak = worker.close()
    assert 10e6 < peak < 10e9


def test_a_worker_that_dies_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match='died'):
        Worker('benchmarks.gemm', tmp_path / 'missing.npz')
