"""Two phases: the head first, then more of the network at lower rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import params
from cnn_jax.errors import UserError

CHANGES = {
    'train__frozen': ('block*',),
    'unfreeze__epochs': 1.0,
    'unfreeze__frozen': ('block1_*',),
    'optimizer__name': 'adam',
}


@pytest.fixture
def phases(run, small):
    """The steps of both phases, the state before the first, and the values."""

    def make(**changes):
        config = small(**CHANGES | changes)
        (first, state, values), (second, _, _) = (
            run(config, ends=(3, 6), phase=phase) for phase in (0, 1)
        )
        return first, second, state, values

    return make


def trained(steps, state, values, batch, count):
    train = jax.jit(steps.train)
    for number in range(count):
        state, _ = train(state, batch(number), values)
    return state


def moved(before, after):
    """How far each parameter went, in the largest of its elements."""
    before, after = params.flatten(before.params), params.flatten(after.params)
    return {path: float(jnp.abs(after[path] - before[path]).max()) for path in after}


def test_the_second_phase_trains_the_second_block_too(phases):
    first, second, *_ = phases()
    assert {name.split('/')[0] for name in first.trainable} == {'head'}
    blocks = {name.split('_')[0] for name in second.trainable if name.startswith('block')}
    assert blocks == {'block2'}
    assert set(first.trainable) < set(second.trainable)


def test_old_optimizer_state_is_kept_and_new_is_fresh(phases, batch):
    first, second, state, values = phases(train__ema=0.9)
    between = trained(first, state, values, batch, 3)
    entered = second.enter(between)
    (kept,), (same, fresh) = between.opt_state, entered.opt_state
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(same)))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(fresh))
    assert set(entered.ema) == set(second.trainable)
    weights = params.flatten(between.params)
    new = set(second.trainable) - set(first.trainable)
    assert all(np.array_equal(entered.ema[path], weights[path]) for path in new)


def test_entering_changes_no_weight_and_training_moves_what_is_unfrozen(phases, batch):
    first, second, state, values = phases()
    between = trained(first, state, values, batch, 3)
    entered = second.enter(between)
    assert set(moved(between, entered).values()) == {0.0}
    far = moved(entered, trained(second, entered, values, batch, 2))
    for path, distance in far.items():
        assert (distance > 0) == (not path.startswith('block1_')), path


def test_rates_fall_with_the_distance_from_the_head(phases, batch):
    # The first step of Adam moves every element by its rate, whatever the gradient.
    first, second, state, values = phases(
        unfreeze__frozen=(), unfreeze__learning_rate=0.001, unfreeze__depth_decay=0.1
    )
    entered = second.enter(trained(first, state, values, batch, 1))
    far = moved(entered, trained(second, entered, values, batch, 1))
    assert far['block2_conv2/kernel'] == pytest.approx(1e-3, rel=0.01)
    assert far['block1_conv2/kernel'] == pytest.approx(1e-4, rel=0.01)
    assert far['head/logits/kernel'] > 1e-3


def test_rates_of_the_second_phase_are_values(phases, batch, small):
    first, second, state, values = phases()
    entered = second.enter(trained(first, state, values, batch, 1))
    train = jax.jit(second.train)
    slow, _ = train(entered, batch(), values)
    slower, _ = train(entered, batch(), values | {'unfreeze.learning_rate': 0.0})
    assert train._cache_size() == 1
    assert moved(entered, slow)['block2_conv2/kernel'] > 0
    assert moved(entered, slower)['block2_conv2/kernel'] == 0


def test_freezing_what_was_trained_is_refused(phases):
    with pytest.raises(UserError, match='head/dense1/bias, which the first phase trains'):
        phases(unfreeze__frozen=('head/*',))
