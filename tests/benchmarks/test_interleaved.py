import pytest

from benchmarks import gate, interleaved, problem
from benchmarks.entrants import Entrant

GEMM = Entrant('benchmarks.gemm')


def test_rounds_of_two_contenders(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(interleaved, 'TURN_SECONDS', 0.01)
    problem.write(tiny, tmp_path / 'problem.npz')
    seen = []
    found = interleaved.measure(
        {'a': GEMM, 'b': Entrant('benchmarks.stock_flax')},
        tmp_path / 'problem.npz',
        tmp_path,
        rounds=2,
        numbers=3,
        check=lambda losses: seen.append(losses) or 'checked',
        least=1,
        warm=0,
    )
    ((only,),) = (each.items() for each in seen)
    assert only[0] == 'b'  # a product has no losses
    assert len(only[1]) == 3
    assert found.checked == 'checked'
    assert [len(taken) for taken in found.seconds.values()] == [2, 2]
    assert all(found.first_step[name] > 0 for name in 'ab')
    assert all(10 < found.peak[name] < 10_000 for name in 'ab')
    assert [version.split()[0] for version in found.versions] == ['jax', 'flax']


def test_nothing_is_timed_after_a_gate_that_fails(tiny, tmp_path):
    def refuse(losses):
        raise gate.Disagreement('not the same')

    problem.write(tiny, tmp_path / 'problem.npz')
    with pytest.raises(gate.Disagreement, match='not the same'):
        interleaved.measure(
            {'a': GEMM}, tmp_path / 'problem.npz', tmp_path, rounds=1, numbers=1, check=refuse
        )


def test_the_best_by_median_and_ratios_within_a_round():
    seconds = {'a': [1.0, 9.0, 9.0], 'b': [2.0, 2.0, 50.0], 'ours': [1.0, 1.0, 1.0]}
    assert interleaved.best(seconds, ['a', 'b']) == 'b'
    assert interleaved.ratios(seconds['a'], seconds['b']) == [0.5, 4.5, 0.18]
