import numpy as np
import pytest

from benchmarks import problem, workloads


def test_a_problem_survives_its_file(tiny, tmp_path):
    problem.write(tiny, tmp_path / 'problem.npz')
    back = problem.read(tmp_path / 'problem.npz')
    for name in ('config', 'preprocessing', 'classes'):
        # A tuple is a list in JSON.
        assert problem.json.dumps(getattr(back, name)) == problem.json.dumps(getattr(tiny, name))
    assert back.weights.keys() == tiny.weights.keys()
    for name, value in tiny.weights.items():
        np.testing.assert_array_equal(back.weights[name], value)
    np.testing.assert_array_equal(back.images, tiny.images)


def test_training_flops_by_hand(tiny):
    stem = 2 * 3 * 3 * (7 * 7 * 1 * 3)  # (12 − 7)/2 + 1 = 3 pixels a side
    pair = 2 * 3 * 3 * (3 * 3 * 3 * 4) + 2 * 2 * 2 * (3 * 3 * 4 * 4)
    dense = 2 * (16 * 8) + 2 * (8 * 3)
    assert workloads.training_flops(tiny) == 4 * (2 * stem + 3 * (pair + dense))


@pytest.mark.parametrize(('name', 'gflop'), [('strided96', 9.74), ('small28', 2.99)])
def test_gflop_of_a_step(name, gflop):
    assert workloads.training_flops(workloads.step_problem(name)) / 1e9 == pytest.approx(
        gflop, abs=0.005
    )
