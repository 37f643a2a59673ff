"""Schedules and update rules: exact small cases, Keras as the reference, laws of decay."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax import optim, rng
from cnn_jax.config import Optimizer

STEPS = range(0, 40)


def rates(config, steps_per_epoch=10, total=40):
    rate = optim.schedule(config, steps_per_epoch, total)
    return np.array([rate(jnp.int32(step)) for step in STEPS], np.float64)


def updates(config, gradients, weights, decayed=()):
    """The weights after applying `gradients` in turn."""
    group = optim.Group(list(weights), optim.schedule(config, 10, 100))
    rule = optim.make_optimizer(config, [group], decayed=decayed)
    state = rule.init(weights)
    for gradient in gradients:
        step, state = rule.update(gradient, state, weights)
        weights = jax.tree.map(jnp.add, weights, step)
    return weights, state


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({}, np.ones(40)),
        ({'warmup_epochs': 1}, np.minimum(1, np.arange(1, 41) / 10)),
        (
            {'schedule': 'cosine', 'warmup_epochs': 1},
            np.append(np.arange(1, 11) / 10, (1 + np.cos(np.pi * np.arange(30) / 30)) / 2),
        ),
        (
            {'schedule': 'step', 'decay_rate': 0.1, 'boundaries': (1.0, 2.5)},
            np.repeat([1.0, 0.1, 0.01], [10, 15, 15]),
        ),
        (
            {'schedule': 'inverse_time', 'decay_rate': 0.5, 'decay_steps': 7},
            [keras.optimizers.schedules.InverseTimeDecay(1.0, 7, 0.5)(step) for step in STEPS],
        ),
    ],
    ids=str,
)
def test_schedules_are_their_formulas(fields, expected):
    got = rates(Optimizer(learning_rate=0.3, **fields))
    np.testing.assert_allclose(got, 0.3 * np.asarray(expected), rtol=1e-5, atol=1e-7)


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
        (Optimizer(name='adam', learning_rate=0.1), lambda: keras.optimizers.Adam(0.1)),
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


@pytest.mark.parametrize('many', [2**31 - 1, 2**31, 10**30])
@pytest.mark.parametrize(
    ('fields', 'right'),  # as functions of the large number and of the step
    [
        ({'schedule': 'cosine'}, lambda n, t: 0.5 * (1 + np.cos(np.pi * t / n))),
        ({'schedule': 'constant', 'warmup_epochs': 'many'}, lambda n, t: (t + 1) / n),
        ({'schedule': 'cosine', 'warmup_epochs': 'many'}, lambda n, t: (t + 1) / n),
        ({'schedule': 'step', 'decay_rate': 0.1, 'boundaries': ('many',)}, lambda n, t: 1.0),
        (
            {'schedule': 'inverse_time', 'decay_rate': 3.0, 'decay_steps': 'many'},
            lambda n, t: 1 / (1 + 3 * t / n),
        ),
    ],
    ids=['cosine', 'warmup', 'warmup of cosine', 'step', 'inverse_time'],
)
def test_no_number_of_steps_is_too_large(fields, right, many):
    """Relative to the formula in float64, at steps that an int32 still holds."""
    given = {
        name: (many,) if value == ('many',) else many if value == 'many' else value
        for name, value in fields.items()
    }
    rate = jax.jit(optim.schedule(Optimizer(learning_rate=1.0, **given), 1.0, int(many)))
    for step in (0, 5, 10**9, 2**31 - 2):
        reach = min(many, 2**31 - 1) if 'warmup_epochs' in fields else many
        assert rate(jnp.int32(step)) == pytest.approx(right(reach, step), rel=1e-5, abs=1e-6)


def test_epsilon_is_added_where_kingma_and_ba_add_it_and_not_where_keras_does():
    config = Optimizer(name='adam', learning_rate=1.0, epsilon=1e-4)
    zero, draw = {'w': jnp.zeros(7)}, np.random.default_rng(0)
    gradients = draw.normal(size=(5, 7)).astype(np.float32) * np.logspace(-6, 0, 7, dtype='f4')
    w, keras_w, m, v = np.zeros(7), np.zeros(7), np.zeros(7), np.zeros(7)
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w -= m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-4)
        moved = 1e-4 / np.sqrt(1 - 0.999**t)  # Keras's in our terms
        keras_w -= m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + moved)
    rule, weight = keras.optimizers.Adam(1.0, epsilon=1e-4), keras.Variable(np.zeros(7, 'f4'))
    for gradient in gradients:
        rule.apply([jnp.asarray(gradient)], [weight])
    ours, _ = updates(config, [{'w': jnp.asarray(g)} for g in gradients], zero)
    np.testing.assert_allclose(ours['w'], w, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(weight), keras_w, rtol=1e-4)


def test_each_parameter_is_in_a_group_or_frozen_and_what_a_rule_reads_is_given():
    config, rate = Optimizer(weight_decay=0.1), lambda step: 0.1
    weights = {name: jnp.ones(2) for name in 'abc'}
    ab = optim.Group(['a', 'b'], rate)
    with pytest.raises(KeyError, match='c'):
        optim.make_optimizer(config, [ab]).init(weights)
    rule = optim.make_optimizer(config, [ab], frozen=['c'])
    state = rule.init(weights)
    with pytest.raises(KeyError, match='d'):
        rule.update({**weights, 'd': weights['a']}, state, {**weights, 'd': weights['a']})
    with pytest.raises(ValueError, match='params'):
        rule.update(weights, state)
    assert jax.tree.map(jnp.shape, rule.update(weights, state, weights)[0]).keys() == {*'abc'}


def test_decay_moves_only_the_decayed():
    config = Optimizer(name='adam', learning_rate=0.5, weight_decay=0.1)
    zero = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
    got, _ = updates(config, [zero], {'a': jnp.ones(2), 'b': jnp.ones(2)}, decayed=['a'])
    np.testing.assert_allclose(got['a'], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(got['b'], 1)


def test_under_plain_sgd_l2_equals_decoupled_decay_of_twice_the_strength():
    start, gradient = {'w': jnp.array([1.0, -3.0])}, {'w': jnp.array([0.2, 0.4])}
    plain = Optimizer(name='sgd', learning_rate=0.1, momentum=0.0)
    penalty = jax.grad(lambda w: 0.03 * jnp.sum(jnp.square(w['w'])))(start)  # `regularizers.l2`
    by_loss, _ = updates(plain, [{'w': gradient['w'] + penalty['w']}], start)
    decay = Optimizer(name='sgd', learning_rate=0.1, momentum=0.0, weight_decay=0.06)
    by_decay, _ = updates(decay, [gradient], start, decayed=['w'])
    np.testing.assert_allclose(by_loss['w'], by_decay['w'], rtol=1e-6)


def test_groups_have_rates_scales_and_step_counts_of_their_own():
    config = Optimizer(name='sgd', learning_rate=1.0, momentum=0.0)
    slow = Optimizer(learning_rate=0.1, schedule='step', decay_rate=0.5, boundaries=(0.1,))
    groups = [
        optim.Group(['a'], optim.schedule(config, 10, 100)),
        optim.Group(['b', 'c'], optim.schedule(slow, 10, 100), scales={'c': 0.5}),
    ]
    rule = optim.make_optimizer(config, groups)
    weights = {name: jnp.zeros(1) for name in 'abc'}
    gradient = {name: jnp.ones(1) for name in 'abc'}
    state = rule.init(weights)
    steps = []
    for _ in range(2):
        step, state = rule.update(gradient, state, weights)
        steps.append([float(step[name][0]) for name in 'abc'])
    np.testing.assert_allclose(steps, [[-1, -0.1, -0.05], [-1, -0.05, -0.025]], rtol=1e-6)


def test_the_global_norm_is_optaxs():
    rng = np.random.default_rng(0)
    tree = {'a': rng.normal(size=(4, 5)).astype(np.float32), 'b': np.float32([3.0, -4.0])}
    np.testing.assert_allclose(optim.global_norm(tree), optax.tree.norm(tree), rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.01, 10))
def test_no_unit_has_more_than_the_largest_norm(seed, bound):
    kernel = np.random.default_rng(seed).normal(size=(3, 2, 5)).astype(np.float32)
    norms = np.sqrt((np.float64(kernel) ** 2).sum(axis=(0, 1)))
    got = np.asarray(optim.project_max_norm(jnp.asarray(kernel), bound))
    np.testing.assert_allclose(got, kernel * np.minimum(1, bound / norms), rtol=1e-5)
    small = norms < bound * (1 - 1e-6)
    np.testing.assert_array_equal(got[..., small], kernel[..., small])
    np.testing.assert_allclose(optim.project_max_norm(jnp.asarray(got), bound), got, rtol=1e-6)


def test_a_kernel_of_zeros_has_no_norm_to_bound():
    np.testing.assert_array_equal(optim.project_max_norm(jnp.zeros((2, 3)), 1.0), 0)


@pytest.mark.parametrize('step', [0, 99])
def test_the_variance_of_the_noise_falls_as_in_the_paper(step):
    gradients = {'a': jnp.ones(20_000), 'b': jnp.zeros((100, 200))}
    noisy = optim.add_gradient_noise(rng.key(0, 'gradient_noise', step), gradients, 0.3, step)
    noise = {path: np.asarray(noisy[path] - gradients[path], np.float64) for path in noisy}
    for drawn in noise.values():
        assert drawn.mean() == pytest.approx(0, abs=5 * drawn.std() / 20_000**0.5)
        assert drawn.var() == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.05)
    assert abs(np.corrcoef(noise['a'], noise['b'].ravel())[0, 1]) < 0.05


def test_noise_depends_on_the_path_and_not_on_the_other_parameters():
    key, zeros = rng.key(3, 'gradient_noise'), {'a': jnp.zeros(4), 'b': jnp.zeros(4)}
    both, one = (optim.add_gradient_noise(key, tree, 1.0, 0) for tree in (zeros, {'b': zeros['b']}))
    np.testing.assert_array_equal(both['b'], one['b'])


def test_sam_on_a_quadratic():
    """f = ½(w₁² + 4w₂²) at (3, 1): g = (3, 4), of norm 5."""
    weights, curvature = {'a': jnp.array([3.0]), 'b': jnp.array([1.0])}, {'a': 1.0, 'b': 4.0}

    def f(w):
        return sum(0.5 * curvature[name] * jnp.sum(w[name] ** 2) for name in w)

    worse = optim.sam_perturb(weights, jax.grad(f)(weights), 0.5)
    np.testing.assert_allclose([worse['a'][0], worse['b'][0]], [3.3, 1.4], rtol=1e-6)
    gradient = jax.grad(f)(worse)
    np.testing.assert_allclose([gradient['a'][0], gradient['b'][0]], [3.3, 5.6], rtol=1e-6)


def test_uphill_of_a_flat_place_is_the_place():
    weights = {'a': jnp.array([3.0])}
    np.testing.assert_array_equal(optim.sam_perturb(weights, {'a': jnp.zeros(1)}, 0.5)['a'], [3.0])
