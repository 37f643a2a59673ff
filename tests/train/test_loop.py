"""The loop: records, checkpoints, exact continuation, and a loss that is not finite."""

import json

import jax
import numpy as np
import pytest

from cnn_jax.errors import RunFailed
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.meter import Meter

SHORT = {'train__epochs': 2.0, 'train__eval_every': 0.5, 'train__checkpoint_every': 0.25}


class Killed(Exception):
    """Stands for a process that ends without a word."""


def lines(folder):
    return [json.loads(text) for text in (folder / 'metrics.jsonl').read_text().splitlines()]


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_each_step_is_compiled_once_last_partial_batch_included(small, fit):
    outcome = fit(small(**SHORT), count=53)
    assert outcome.compilations == [{'train': 1, 'evaluate': 1}]
    assert outcome.metrics['count'] == 53


def test_training_metrics_count_each_example_once_an_epoch(small, fit, tmp_path):
    fit(small(**SHORT | {'train__eval_every': 1.0}), count=48)
    counts = [line['count'] for line in lines(tmp_path / 'run') if line['split'] == 'train']
    assert counts == [48, 48]


def test_it_learns(small, fit):
    outcome = fit(small(train__epochs=15.0, model__dropout=0.0, model__head_dropout=0.0))
    assert outcome.metrics['accuracy'] > 0.9


@pytest.fixture
def killed_run(fit_again, tmp_path, monkeypatch):
    """Kills a run after a step, starts it again, and returns its end and its record."""

    def make(config, step):
        folder, add = tmp_path / f'killed {step}', Meter.add

        def add_then_die(self, number, sums):
            if number == step:
                raise Killed
            add(self, number, sums)

        monkeypatch.setattr(Meter, 'add', add_then_die)
        with pytest.raises(Killed):
            fit_again(config, folder)
        monkeypatch.setattr(Meter, 'add', add)
        return fit_again(config, folder), lines(folder)

    return make


def test_killed_after_any_step_it_goes_on_to_the_same_bits(small, fit_again, killed_run, tmp_path):
    config = small(**SHORT, train__ema=0.9)
    whole = fit_again(config)
    for step in range(1, 13):
        again, record = killed_run(config, step)
        assert same(whole.state, again.state), step
        assert record == lines(tmp_path / 'run'), step


def test_killed_in_either_phase_it_goes_on_to_the_same_bits(small, fit_again, killed_run, tmp_path):
    config = small(
        **SHORT | {'train__epochs': 1.0},
        train__frozen=('block*',),
        unfreeze__epochs=1.0,
        unfreeze__learning_rate=0.001,
    )
    whole = fit_again(config)
    for step in (4, 6, 7, 12):  # the phases end at steps 6 and 12
        again, record = killed_run(config, step)
        assert same(whole.state, again.state), step
        assert record == lines(tmp_path / 'run'), step


@pytest.mark.slow
def test_killed_with_all_that_a_state_can_hold_it_goes_on_to_the_same_bits(
    small, fit_again, killed_run, tmp_path
):
    config = small(
        **SHORT | {'train__epochs': 1.0},
        train__frozen=('block1_*',),
        train__swa_from=0.5,
        train__precise_norm=2,
        unfreeze__epochs=1.0,
        loss__l2_sp=0.1,
        loss__l2_sp_on=('*/kernel',),
        optimizer__gradient_noise=0.01,
        optimizer__max_norm=2.0,
        optimizer__sam=0.05,
        model__drop_ramp=1.0,
    )
    whole = fit_again(config)
    assert set(whole.state.start) == {path for path in whole.state.ema if path.endswith('kernel')}
    for step in (2, 7, 11):
        again, record = killed_run(config, step)
        assert same(whole.state, again.state), step
        assert record == lines(tmp_path / 'run'), step


def test_a_checkpoint_holds_nothing_for_what_is_off(small, fit, tmp_path):
    fit(small(**SHORT))
    for name, held in (('opt_state', True), ('start', False), ('precise', False)):
        path = tmp_path / 'run/checkpoints/step_12/state/_METADATA'
        assert (f'"{name}"' in path.read_text()) == held, name


def test_a_finished_run_is_not_trained_again(small, fit, tmp_path):
    first = fit(small(**SHORT))
    again = fit(small(**SHORT))
    assert same(first.state, again.state)
    assert again.compilations[0]['train'] == 0
    assert again.metrics['loss'] == first.metrics['loss']


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(small, fit):
    with pytest.raises(RunFailed, match=r'not finite at step \d+.*learning_rate'):
        fit(small(**SHORT, optimizer__name='sgd', optimizer__learning_rate=1e30))


def test_the_latest_and_the_best_checkpoints_are_kept(small, run, tmp_path):
    _, state, _ = run(small())
    config = small(train__keep=2, train__best='accuracy')
    kept = Checkpoints(tmp_path / 'c', config)
    for step, accuracy in enumerate([0.1, 0.9, 0.5, 0.6, 0.2], start=1):
        scores = {'accuracy': accuracy, 'loss': 1.0}
        kept.save(state.replace(step=np.int32(step)), {'sums': None}, scores)
    again = Checkpoints(tmp_path / 'c', config)
    assert again.latest() == 5
    assert again.best() == 2
    restored, _ = again.restore(2, state)
    assert same(restored, state.replace(step=np.int32(2)))


def test_a_loss_that_is_no_number_is_never_the_best(small, run, tmp_path):
    _, state, _ = run(small())
    kept = Checkpoints(tmp_path / 'c', small(train__best='loss'))
    for step, loss in enumerate([0.5, float('nan'), 0.7, 0.6], start=1):
        scores = {'accuracy': 0.1, 'loss': loss}
        kept.save(state.replace(step=np.int32(step)), {'sums': None}, scores)
        assert kept.best() == 1


def test_without_a_checkpoint_there_is_no_latest(small, tmp_path):
    assert Checkpoints(tmp_path / 'none', small()).latest() is None
    assert Checkpoints(tmp_path / 'none', small()).best() is None
