"""Early stopping: the rule on made-up curves, and a run that follows it."""

import json

import jax
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.train import early_stopping
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.early_stopping import Best
from cnn_jax.train.meter import Meter

PER_EPOCH = 6.25


def end(scores, patience, per_epoch=PER_EPOCH):
    """The epoch after which a run with these scores ends, and that of its best one."""
    config = cfg.replace(cfg.Config(), {'train.patience': patience})
    best = Best()
    for epoch, score in enumerate(scores, start=1):
        step = int(np.ceil(epoch * per_epoch))  # where `Task.due` evaluates
        best = best.after(step, score)
        if early_stopping.is_over(config, best, step, per_epoch):
            break
    return epoch, round(best.step / per_epoch)


@pytest.mark.parametrize('per_epoch', [1.0, 4.0, 6.25, 15.6])
@pytest.mark.parametrize(
    ('scores', 'patience', 'expected'),
    [
        ([1, 2, 3, 4, 5, 6], 2, (6, 6)),  # ever better: to the end
        ([1, 3, 2, 2, 9], 2, (4, 2)),  # too late for the 9
        ([1, 3, 2, 4, 2, 2, 2], 2, (6, 4)),
        ([3, 3, 3, 3], 2, (3, 1)),  # an equal one is no better
        ([3, float('nan'), 1, 4], 2, (3, 1)),
        ([5, 4, 3, 2, 1], 0, (5, 1)),  # no patience asked for
        ([5, 4, 3, 2, 1], 1, (2, 1)),
    ],
)
def test_the_rule_on_made_up_curves(scores, patience, expected, per_epoch):
    assert end(scores, patience, per_epoch) == expected


def test_a_lower_loss_is_better():
    config = cfg.replace(cfg.Config(), {'train.best': 'loss'})
    assert early_stopping.score_of(config, {'loss': 0.5, 'accuracy': 0.9}) == -0.5


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'train__eval_every': 0.0}, 'needs evaluations'),
        ({'unfreeze__epochs': 1.0, 'train__frozen': ('block*',)}, 'a run of one phase'),
    ],
)
def test_patience_that_makes_no_sense_is_refused(small, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        small(train__patience=1.0, **changes)


@pytest.fixture
def impatient(small):
    """A run whose rate is too high to go on getting better."""
    return small(
        train__epochs=12.0,
        train__patience=1.0,
        train__eval_every=0.5,
        train__checkpoint_every=0.25,
        train__best='loss',
        train__precise_norm=2,
        train__ema=0.5,
        optimizer__learning_rate=0.3,
    )


class Killed(Exception):
    """Stands for a process that ends without a word."""


def test_a_run_ends_early_at_its_best_and_a_killed_one_at_the_same_step(
    impatient, fit, fit_again, tmp_path, monkeypatch
):
    whole = fit_again(impatient)
    text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line['split'] == 'eval']
    losses = [line['loss'] for line in lines]
    best = lines[int(np.argmin(losses))]
    assert not whole.stopped
    assert whole.compilations == [{'train': 1, 'evaluate': 1}]
    assert lines[-1]['epoch'] < 12
    assert lines[-1]['epoch'] - best['epoch'] == pytest.approx(1.0, abs=0.2)
    assert int(whole.state.step) == best['step']
    assert whole.metrics is not None
    assert whole.metrics['loss'] == best['loss']
    assert Checkpoints(tmp_path / 'run/checkpoints', impatient).best() == best['step']

    add, last = Meter.add, lines[-1]['step']
    for step in (best['step'] + 1, last):
        folder = tmp_path / f'killed {step}'

        def add_then_die(self, number, sums, step=step):
            if number == step:
                raise Killed
            add(self, number, sums)

        monkeypatch.setattr(Meter, 'add', add_then_die)
        with pytest.raises(Killed):
            fit_again(impatient, folder)
        monkeypatch.setattr(Meter, 'add', add)
        again = fit_again(impatient, folder)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole.state, again.state)))
        assert (folder / 'metrics.jsonl').read_text() == text

    once_more = fit(impatient)
    assert once_more.compilations[0]['train'] == 0
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole.state, once_more.state)))
