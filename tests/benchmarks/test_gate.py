import copy
import dataclasses

import pytest

from benchmarks import gate, keras_step, ours, stock_flax

STEPS = 5


def changed(problem, group, **fields):
    """The problem with some fields of its config replaced."""
    config = copy.deepcopy(problem.config)
    config[group] |= fields
    return dataclasses.replace(problem, config=config)


@pytest.fixture(scope='module')
def losses(tiny):
    return ours.start(tiny).losses(STEPS)


def test_this_project_and_stock_flax_train_the_same_network(tiny, losses):
    stock = stock_flax.start(tiny)
    assert gate.check({'ours': losses, 'stock': stock.losses(STEPS)}) < 1e-4
    stock.run(1)
    assert stock.losses(STEPS) == pytest.approx(losses, rel=1e-4)  # from the start again


def test_keras_trains_the_same_network(tiny, losses):
    peer = keras_step.start(tiny)
    assert gate.check({'ours': losses, 'keras': peer.losses(STEPS)}) < 1e-4
    peer.run(1)
    assert peer.losses(STEPS) == pytest.approx(losses, rel=1e-4)  # from the start again


@pytest.mark.parametrize(
    ('group', 'fields'),
    [
        ('loss', {'l2': 0.0}),
        ('optimizer', {'learning_rate': 1.5e-4}),
    ],
)
def test_another_loss_or_optimizer_is_refused(tiny, losses, group, fields):
    stock = stock_flax.start(changed(tiny, group, **fields))
    with pytest.raises(gate.Disagreement, match='the loss of stock is'):
        gate.check({'ours': losses, 'stock': stock.losses(STEPS)})


def test_another_network_is_refused(tiny):
    with pytest.raises(AssertionError):
        stock_flax.start(changed(tiny, 'model', stem_width=0))


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(gate.Disagreement, match='at step 2 the loss of b is nan'):
        gate.check({'a': [1.0, 1.0], 'b': [1.0, float('nan')]})
