"""What is measured, and the tables that are kept."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, plot, problem, results, workloads
from benchmarks.regularization import ARMS
from cnn_jax.train.setup import preparation

COMMANDS = [
    path.stem
    for path in Path(problem.__file__).parent.glob('*.py')
    if 'def main() -> None' in path.read_text() or path.stem == '__main__'
]


@pytest.mark.parametrize('module', COMMANDS)
def test_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [module, '--help'])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f'benchmarks.{module}').main()
    assert stop.value.code == 0
    assert 'python -m benchmarks' in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'gflop'), [('strided96', 9.74), ('small28', 2.99)])
def test_a_problem_has_the_experiments_size_and_survives_its_file(name, gflop, tmp_path):
    made = workloads.step_problem(name)
    assert workloads.training_flops(made) / 1e9 == pytest.approx(gflop, abs=0.005)
    problem.write(made, tmp_path / 'problem.npz')
    back = problem.read(tmp_path / 'problem.npz')
    np.testing.assert_array_equal(back.images, made.images)
    assert back.weights.keys() == made.weights.keys()
    for path, weights in made.weights.items():
        np.testing.assert_array_equal(back.weights[path], weights)


@pytest.mark.parametrize(
    'spec',
    [
        {'kind': 'caffe'},
        {'kind': 'standardize', 'mean': [0.1, 0.5, 0.6], 'std': [0.3, 0.2, 0.1], 'channels': 3},
    ],
)
def test_peers_prepare_images_as_this_project_does(spec):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    made = problem.Problem({}, spec, images, images, 2, {})
    expected = [preparation(spec)(batch) for batch in images]
    np.testing.assert_allclose(problem.prepared(made), expected, rtol=1e-5, atol=1e-5)


def test_the_ablations_gate_sees_each_combination_and_the_peers_all_that_an_arm_changes():
    kinds = [(c.model.norm, c.model.head_norm, c.loss.l2) for c in ablation.gate_configs()]
    assert len(set(kinds)) == len(kinds) == 4
    assert {path for changes in ARMS.values() for path in changes} <= {*ablation.OPTIONS}


def test_the_figure_shows_the_ratios_of_the_tables(tmp_path):
    path = tmp_path / 'RESULTS.md'
    rows = [['cnn_jax', '4', '2.00 [2–2]'], ['Flax', '2', '1.00 [1–1]']]
    for title, of in [('Step', results.OF_BEST), ('Words', ''), ('Step', results.OF_BEST)]:
        results.write_section(path, title, results.table(['contender', 'ms', of], rows))
    (found,) = plot.workloads(path.read_text())
    assert (found.title, found.ratios) == ('Step', {'cnn_jax': 2.0, 'Flax': 1.0})
    plot.draw([found], tmp_path / 'speed.png')
    assert 0 < (tmp_path / 'speed.png').stat().st_size < 200_000
