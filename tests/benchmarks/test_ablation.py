import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, ablation_contenders, ablation_peer, gate, process
from cnn_jax import config as cfg
from experiments.regularization import ARMS, get_config

# Waits for its partner (0 and 1, 2 and 3), then says how many are there and on which cores it is.
MEET = """
import os, pathlib, sys, time
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
here = folder / f'here{number}'
here.touch()
(folder / f'came{number}').touch()
end = time.monotonic() + 20
while not (folder / f'came{number ^ 1}').exists():
    assert time.monotonic() < end
    time.sleep(0.01)
print(len(list(folder.glob('here*'))), *os.sched_getaffinity(0))
here.unlink()
"""


def meet(folder, count, **options):
    """How many are there, and the cores, as each process says."""
    commands = [[sys.executable, '-c', MEET, str(folder), str(i)] for i in range(count)]
    _, texts = process.pooled(commands, {}, **options)
    return [[int(word) for word in text.split()] for text in texts]


def test_the_pool_keeps_two_processes_going(tmp_path):
    assert max(there for there, *_ in meet(tmp_path, 4, at_once=2)) == 2


def test_pinned_processes_have_a_core_each(tmp_path):
    mine = os.sched_getaffinity(0)
    (_, *first), (_, *second) = meet(tmp_path, 2, at_once=2, pinned=True)
    assert len(first) == len(second) == 1
    assert len({*first, *second}) == min(2, len(mine))
    assert os.sched_getaffinity(0) == mine


def test_a_process_that_fails_is_an_error_with_its_output():
    command = [sys.executable, '-c', 'print("no such thing"); raise SystemExit(3)']
    with pytest.raises(RuntimeError, match='ended with 3:\nno such thing'):
        process.pooled([command] * 3, {}, at_once=2)


def test_variables_reach_the_process_and_the_shell_settings_do_not(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--of_the_shell')
    show = 'import os; print(os.environ.get("XLA_FLAGS"), os.environ["GIVEN"])'
    _, _, text = process.timed([sys.executable, '-c', show], {'GIVEN': '1'})
    assert text.split() == ['None', '1']


def test_rotated():
    assert [process.rotated('abc', number) for number in (0, 1, 3)] == [
        ['a', 'b', 'c'],
        ['b', 'c', 'a'],
        ['a', 'b', 'c'],
    ]


def test_the_numbers_of_the_table():
    outcomes = {
        'cnn_jax': [(10.0, {'none': 0.9}), (20.0, {'none': 0.9})],
        'peer': [(30.0, {'none': 0.8}), (40.0, {'none': 0.9})],
    }
    *_, ours, peer = ablation.table(outcomes, ['none']).splitlines()
    assert ours == '| cnn_jax | 15.0 [12.5–17.5] | 1.00 [1.00–1.00] | 90.0 |'
    assert peer == '| peer | 35.0 [32.5–37.5] | 2.50 [2.25–2.75] | 85.0 |'


def test_the_gate_refuses_a_peer_that_is_wrong_in_one_arm():
    right, wrong = [[2.0, 1.9], [3.0, 2.9]], [[2.0, 1.9], [3.0, 2.89]]
    assert ablation.largest_difference({'cnn_jax': right, 'peer': right}) == 0
    with pytest.raises(gate.Disagreement, match=r'at step 2 the loss of peer is 2\.89'):
        ablation.largest_difference({'cnn_jax': right, 'peer': wrong})


def test_the_gate_sees_each_combination_that_is_left_without_dropout():
    kinds = [(c.model.norm, c.model.head_norm, c.loss.l2) for c in ablation.gate_configs([*ARMS])]
    assert kinds == [
        ('none', 'none', 0.0),
        ('batch', 'batch', 0.0),
        ('none', 'none', 5e-4),
        ('batch', 'batch', 5e-4),
    ]


def test_an_arm_as_options_of_the_scripts(monkeypatch, tmp_path):
    config = cfg.replace(get_config(), ARMS['all'] | {'model.norm_momentum': 0.75})
    flags = ablation_contenders.flags(config)
    monkeypatch.setattr(sys, 'argv', ['peer', str(tmp_path), *flags])
    options = ablation_peer.options()
    assert (options.dropout, options.head_dropout, options.l2) == (0.25, 0.5, 5e-4)
    assert (options.norm, options.head_norm, options.norm_momentum) == ('batch', 'batch', 0.75)
    assert (options.batch, options.learning_rate) == (50, 1e-3)


def test_all_that_an_arm_changes_reaches_the_peers():
    assert {path for changes in ARMS.values() for path in changes} <= {*ablation_contenders.OPTIONS}


def test_the_peers_see_the_batches_of_the_gate(tmp_path):
    ablation_contenders.write_images(tmp_path)
    (x, y), (test_x, test_y) = ablation_peer.images(tmp_path / 'data.npz')
    made = ablation.gate_problem(get_config())
    mean, std = (np.array(made.preprocessing[name]) for name in ('mean', 'std'))
    first, labels = ablation_peer.batches(x, y, 50)[0]
    np.testing.assert_allclose(first, (made.images[0] / 255 - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(labels, made.labels[0])
    assert (len(x), len(test_x), len(test_y)) == (500, 1000, 1000)


def test_an_experiment_with_some_of_the_arms(tmp_path):
    path = ablation_contenders.experiment(tmp_path, ['none', 'L2'])
    found: dict = {}
    exec(Path(path).read_text(), found)
    assert found['ARMS'] == {'none': {}, 'L2': {'loss.l2': 5e-4}}
    assert found['get_config']() == get_config()
    assert ablation_contenders.experiment(tmp_path, list(ARMS)) == 'experiments/regularization.py'
