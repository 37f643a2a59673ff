import numpy as np
import pytest

from benchmarks import problem
from benchmarks.worker import Worker, forward


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


def test_a_contender_may_be_a_function_of_a_module(tiny, tmp_path):
    problem.write(tiny, tmp_path / 'problem.npz')
    worker = Worker('benchmarks.gemm:start', tmp_path / 'problem.npz')
    worker.close()
    assert worker.version.startswith('jax ')


def test_forward_computes_the_batches_in_turn():
    seen = []
    contender = forward(lambda batch: seen.append(batch) or np.array([[batch, 2]]), [7, 8], 'v')
    contender.run(3)
    assert seen == [7, 8, 7]
    assert contender.losses(2) == [7, 2]
