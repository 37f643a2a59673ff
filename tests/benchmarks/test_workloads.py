import numpy as np
import pytest

from benchmarks import problem, workloads
from cnn_jax.train.setup import preparation


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


@pytest.mark.parametrize(
    'spec',
    [
        {'kind': 'caffe'},
        {'kind': 'standardize', 'mean': [0.1, 0.5, 0.6], 'std': [0.3, 0.2, 0.1], 'channels': 3},
    ],
)
def test_prepared_images_are_those_of_this_project(spec):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    made = problem.Problem({}, spec, images, images, 2, {})
    expected = [preparation(spec)(batch) for batch in images]
    np.testing.assert_allclose(problem.prepared(made), expected, rtol=1e-5, atol=1e-5)


def test_kernels_by_their_layer(tiny):
    found = problem.kernels(tiny)
    assert {*found} == {'stem_conv', 'block1_conv1', 'block1_conv2', 'dense1', 'logits'}
    assert found['dense1'] is tiny.weights['head/dense1/kernel']


def test_crops_are_parts_of_the_photograph():
    first, second = workloads.crops('china', 2, np.random.default_rng(0))
    assert first.shape == second.shape == (224, 224, 3)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, second)


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
