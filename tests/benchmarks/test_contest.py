"""The contenders solve the same problem, and what does not is refused before anything is timed."""

import argparse
import copy
import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import (
    accelerator,
    contest,
    features,
    flax_peer,
    keras_peer,
    onnx_features,
    ours,
    problem,
    workloads,
)
from benchmarks.contest import Disagreement, Entrant
from cnn_jax.config import Config, Data, Loss, Model
from experiments import finetune_vgg16

STEPS = 5
OUTPUTS = 2 * 2 * 2 * 512


@pytest.fixture(scope='module')
def tiny():
    """Two batches of four 12×12 grey images for a net with a stem, a pair and a hidden layer."""
    config = Config(
        model=Model(stem_width=3, stem_kernel=7, widths=(4,), hidden=(8,)),
        data=Data(batch=4),
        loss=Loss(l2=5e-4),
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 12, 12, 1), np.uint8)
    labels = rng.integers(0, 3, (2, 4), np.int32)
    standardize = {'kind': 'standardize', 'mean': [0.5], 'std': [0.29], 'channels': 1}
    return workloads.problem(config, standardize, images, labels, classes=3)


@pytest.fixture(scope='module')
def losses(tiny):
    return ours.start(tiny).losses(STEPS)


@pytest.mark.parametrize('peer', [flax_peer, keras_peer])
def test_peers_train_the_same_network(tiny, losses, peer):
    contender = peer.start(tiny)
    assert contest.check({'ours': losses, 'peer': contender.losses(STEPS)}) < 1e-4
    contender.run(1)
    assert contender.losses(STEPS) == pytest.approx(losses, rel=1e-4)  # from the start again


@pytest.mark.parametrize(
    ('group', 'fields'), [('loss', {'l2': 0.0}), ('optimizer', {'learning_rate': 1.5e-4})]
)
def test_another_loss_or_optimizer_is_refused(tiny, losses, group, fields):
    config = copy.deepcopy(tiny.config)
    config[group] |= fields
    peer = flax_peer.start(dataclasses.replace(tiny, config=config))
    with pytest.raises(Disagreement, match='peer'):
        contest.check({'ours': losses, 'peer': peer.losses(STEPS)})


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(Disagreement, match='step 2'):
        contest.check({'a': [1.0, 1.0], 'b': [1.0, float('nan')]})


@pytest.fixture(scope='module')
def backbone():
    """Two images of 64×64 for random convolutions."""
    rng = np.random.default_rng(0)
    weights, channels = {}, 3
    for i, (width, count) in enumerate(problem.VGG16, start=1):
        for j in range(1, count + 1):
            kernel = rng.standard_normal((3, 3, channels, width), np.float32)
            path = f'backbone/block{i}_conv{j}'
            weights[f'{path}/kernel'] = kernel * np.float32((2 / (9 * channels)) ** 0.5)
            weights[f'{path}/bias'] = rng.standard_normal(width, np.float32)
            channels = width
    images, labels = rng.integers(0, 256, (1, 2, 64, 64, 3), np.uint8), np.zeros((1, 2), np.int32)
    config = dataclasses.asdict(finetune_vgg16.get_config())
    return problem.Problem(config, {'kind': 'caffe'}, images, labels, 2, weights)


def test_features_are_those_of_flax(backbone):
    contenders = {'Flax': flax_peer.features, 'ours': ours.features, 'ONNX': onnx_features.start}
    outputs = {name: start(backbone).losses(OUTPUTS) for name, start in contenders.items()}
    assert max(features.relative_errors(outputs).values()) < 1e-5
    outputs['ours'][0] = float('nan')
    with pytest.raises(Disagreement, match='ours'):
        features.relative_errors(outputs)


def test_all_are_started_compared_and_timed_in_turns(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(contest, 'TURN_SECONDS', 0.01)
    entrants = {'a': Entrant('benchmarks.ours:matmul'), 'b': Entrant('benchmarks.flax_peer')}
    options = {'rounds': 2, 'numbers': 3, 'least': 1, 'warm': 0}
    measured = contest.measure(entrants, tiny, tmp_path, check=dict, **options)
    assert [*measured.checked] == ['b']  # a product has no losses
    assert [len(seconds) for seconds in measured.seconds.values()] == [2, 2]
    assert all(measured.first_step[name] > 0 for name in 'ab')
    assert all(10 < measured.peak[name] < 10_000 for name in 'ab')

    def refuse(losses):
        raise Disagreement('not the same')

    with pytest.raises(Disagreement):
        contest.measure({'a': entrants['a']}, tiny, tmp_path, check=refuse, **options)


def test_processes_run_at_once_pinned_and_their_failures_are_told():
    show = [sys.executable, '-c', 'import os; print(*os.sched_getaffinity(0))']
    _, texts = contest.pooled([show] * 2, {}, at_once=2, pinned=True)
    assert all(len(text.split()) == 1 for text in texts)
    failing = [sys.executable, '-c', 'print("no such thing"); raise SystemExit(3)']
    with pytest.raises(RuntimeError, match='no such thing'):
        contest.pooled([failing] * 3, {}, at_once=2)


def test_ratios_are_taken_within_a_round():
    seconds = {'a': [1.0, 9.0, 9.0], 'b': [2.0, 2.0, 50.0], 'ours': [1.0, 1.0, 1.0]}
    assert contest.best(seconds, ['a', 'b']) == 'b'
    assert contest.ratio(seconds['a'], seconds['b']) == '0.50 [0.34–2.50]'
    order = []
    contest.take_turns('abc', 4, order.append)
    assert ''.join(order) == 'abcbcacababc'


def test_an_accelerator_is_measured_part_by_part_without_tfds_and_grain(tiny, monkeypatch):
    monkeypatch.setattr(accelerator.workloads, 'step_problem', lambda *_: copy.deepcopy(tiny))
    for name in ('tensorflow_datasets', 'grain'):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    monkeypatch.setattr(accelerator, 'ROUNDS', 1)
    monkeypatch.setattr(accelerator, 'SECONDS', 0.0)
    given = argparse.Namespace(workloads=['small28'], batches=['4'], together=['2'])
    rows = [row for part in accelerator.PARTS for row in accelerator.measured(part, given)]
    speeds = [row for row in rows if 'images/s' in row]
    assert [row['contender'] for row in speeds] == ['cnn_jax', 'Flax'] * 2 + ['2 together'] * 2
    assert {row['type'] for row in speeds} == {'float32', 'bfloat16'}
    assert all(float(row['images/s'].split()[0]) > 0 for row in speeds)
    assert any('kernel' in row for row in rows)
    assert accelerator.report([{'part': 'as run', **row} for row in rows])


def test_what_fails_on_an_accelerator_or_takes_too_long_costs_no_other(monkeypatch, tmp_path):
    out = tmp_path / 'out.md'
    command = [sys.executable, '-m', 'benchmarks.accelerator', '--parts=as run,together']
    command += ['--batches=none', f'--out={out}']
    for minutes, word in [('0', 'the time was over'), ('5', 'failed: ValueError')]:
        subprocess.run([*command, f'--minutes={minutes}'], check=True, capture_output=True)
        assert len(re.findall(word, out.read_text())) == 2
