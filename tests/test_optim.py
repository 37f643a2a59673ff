"""Schedules and update rules: exact small cases, Keras as the reference, laws of decay."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from cnn_jax import losses, optim
from cnn_jax.config import Optimizer

STEPS = range(0, 40)


def rates(config, steps_per_epoch=10, total=40):
    rate = optim.schedule(config, steps_per_epoch, total)
    return np.array([rate(jnp.int32(step)) for step in STEPS], np.float64)


def updates(config, gradients, weights, decayed=()):
    """The weights after applying `gradients` in turn."""
    group = optim.Group(list(weights), optim.schedule(config, 10, 100))
    rule = optim.chain(config, [group], decayed)
    state = rule.init(weights)
    for gradient in gradients:
        step, state = rule.update(gradient, state, weights)
        weights = jax.tree.map(jnp.add, weights, step)
    return weights, state


def test_constant():
    np.testing.assert_allclose(rates(Optimizer(learning_rate=0.3)), 0.3, rtol=1e-6)


def test_cosine_with_warmup():
    got = rates(Optimizer(learning_rate=1.0, schedule='cosine', warmup_epochs=1))
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
    after = np.arange(30)
    np.testing.assert_allclose(got[10:], (1 + np.cos(np.pi * after / 30)) / 2, atol=1e-6)


def test_step_multiplies_at_each_boundary():
    config = Optimizer(learning_rate=1.0, schedule='step', decay_rate=0.1, boundaries=(1.0, 2.5))
    expected = np.repeat([1.0, 0.1, 0.01], [10, 15, 15])
    np.testing.assert_allclose(rates(config), expected, rtol=1e-5)


def test_inverse_time_equals_keras():
    config = Optimizer(learning_rate=1e-3, schedule='inverse_time', decay_rate=0.5, decay_steps=7)
    theirs = keras.optimizers.schedules.InverseTimeDecay(1e-3, 7, 0.5)
    np.testing.assert_allclose(rates(config), [theirs(step) for step in STEPS], rtol=1e-6)


@pytest.mark.parametrize(
    ('config', 'theirs'),
    [
        (
            Optimizer(name='sgd', learning_rate=0.1, momentum=0.9),
            lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        ),
        (
            Optimizer(name='sgd', learning_rate=0.1, momentum=0.9, nesterov=True),
            lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        ),
        (
            Optimizer(name='adam', learning_rate=0.1),
            lambda: keras.optimizers.Adam(0.1),
        ),
        (
            Optimizer(name='adamw', learning_rate=0.1, weight_decay=0.05),
            lambda: keras.optimizers.AdamW(0.1, weight_decay=0.05),
        ),
    ],
)
def test_update_rules_equal_keras(config, theirs):
    draw = np.random.default_rng(1)
    gradients = [{'w': jnp.asarray(g)} for g in draw.normal(size=(6, 5)).astype(np.float32)]
    start = jnp.asarray(draw.normal(size=5).astype(np.float32))
    ours, _ = updates(config, gradients, {'w': start}, decayed=['w'])
    rule, weight = theirs(), keras.Variable(np.asarray(start))
    for gradient in gradients:
        rule.apply([gradient['w']], [weight])
    np.testing.assert_allclose(ours['w'], np.asarray(weight), rtol=1e-5, atol=1e-6)


def test_decay_moves_only_the_decayed():
    config = Optimizer(name='adam', learning_rate=0.5, weight_decay=0.1)
    zero = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
    got, _ = updates(config, [zero], {'a': jnp.ones(2), 'b': jnp.ones(2)}, decayed=['a'])
    np.testing.assert_allclose(got['a'], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(got['b'], 1)


def test_under_plain_sgd_l2_equals_decoupled_decay_of_twice_the_strength():
    start, gradient = {'w': jnp.array([1.0, -3.0])}, {'w': jnp.array([0.2, 0.4])}
    plain = Optimizer(name='sgd', learning_rate=0.1, momentum=0.0)
    penalty = jax.grad(lambda w: losses.l2_penalty(w, ['w'], 0.03))(start)
    by_loss, _ = updates(plain, [{'w': gradient['w'] + penalty['w']}], start)
    decay = Optimizer(name='sgd', learning_rate=0.1, momentum=0.0, weight_decay=0.06)
    by_decay, _ = updates(decay, [gradient], start, decayed=['w'])
    np.testing.assert_allclose(by_loss['w'], by_decay['w'], rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    config = Optimizer(name='sgd', learning_rate=1.0, momentum=0.0, clip_norm=1.0)
    gradient = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
    got, _ = updates(config, [gradient], {'a': jnp.zeros(1), 'b': jnp.zeros(1)})
    np.testing.assert_allclose([got['a'][0], got['b'][0]], [-0.6, -0.8], rtol=1e-6)


def test_numbers_may_be_traced():
    @jax.jit
    def rate_at(learning_rate, decay_rate, step):
        config = Optimizer(
            learning_rate=learning_rate, decay_rate=decay_rate, schedule='inverse_time'
        )
        return optim.schedule(config, 10, 100)(step)

    assert rate_at(0.5, 1.0, 3) == pytest.approx(0.125)


def test_groups_have_rates_scales_and_step_counts_of_their_own():
    config = Optimizer(name='sgd', learning_rate=1.0, momentum=0.0)
    slow = Optimizer(learning_rate=0.1, schedule='step', decay_rate=0.5, boundaries=(0.1,))
    groups = [
        optim.Group(['a'], optim.schedule(config, 10, 100)),
        optim.Group(['b', 'c'], optim.schedule(slow, 10, 100), scales={'c': 0.5}),
    ]
    rule = optim.chain(config, groups, [])
    weights = {name: jnp.zeros(1) for name in 'abc'}
    gradient = {name: jnp.ones(1) for name in 'abc'}
    state = rule.init(weights)
    steps = []
    for _ in range(2):
        step, state = rule.update(gradient, state, weights)
        steps.append([float(step[name][0]) for name in 'abc'])
    np.testing.assert_allclose(steps, [[-1, -0.1, -0.05], [-1, -0.05, -0.025]], rtol=1e-6)


def test_clipping_is_over_all_groups():
    config = Optimizer(name='sgd', learning_rate=1.0, momentum=0.0, clip_norm=1.0)
    rate = optim.schedule(config, 10, 100)
    rule = optim.chain(config, [optim.Group(['a'], rate), optim.Group(['b'], rate)], [])
    weights = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
    gradient = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
    step, _ = rule.update(gradient, rule.init(weights), weights)
    np.testing.assert_allclose([step['a'][0], step['b'][0]], [-0.6, -0.8], rtol=1e-6)


def test_the_global_norm_is_optaxs():
    rng = np.random.default_rng(0)
    tree = {'a': rng.normal(size=(4, 5)).astype(np.float32), 'b': np.float32([3.0, -4.0])}
    np.testing.assert_allclose(optim.global_norm(tree), optax.tree.norm(tree), rtol=1e-6)
