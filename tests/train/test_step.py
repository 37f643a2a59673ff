"""The compiled step: what it computes, and that one compilation serves a whole range of values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.errors import UserError
from cnn_jax.train.step import values_of

QUIET = {'model__dropout': 0.0, 'model__head_dropout': 0.0}
NO_NORM = {'model__norm': 'none', 'model__head_norm': 'none'}


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_one_compilation_serves_every_rate_and_seed(small, run, batch):
    config = small()
    steps, state, _ = run(config)
    train = jax.jit(steps.train)
    results = []
    for changes in ({}, {'seed': 5}, {'model.dropout': 0.0}, {'loss.l2': 0.3}, {'seed': 2**32 - 1}):
        new, _ = train(state, batch(), values_of(cfg.replace(config, changes)))
        results.append(new.params)
    assert train._cache_size() == 1
    assert not any(same(results[0], other) for other in results[1:])


def test_a_value_as_argument_equals_the_value_in_the_config(small, run, batch):
    changed = small(model__dropout=0.4, loss__l2=0.1, optimizer__learning_rate=0.03)
    steps, state, _ = run(small())
    as_argument, _ = jax.jit(steps.train)(state, batch(), values_of(changed))
    steps, state, values = run(changed)
    as_config, _ = jax.jit(steps.train)(state, batch(), values)
    assert same(as_argument.params, as_config.params)


def test_the_objective_is_the_mean_loss_plus_the_penalty(small, run, batch):
    config = small(loss__l2=0.2)
    steps, state, values = run(config)
    _, sums = jax.jit(steps.train)(state, batch(), values)
    kernels = [w for path, w in params.flatten(state.params).items() if '_conv' in path]
    squares = sum((np.asarray(w, np.float64) ** 2).sum() for w in kernels if w.ndim == 4)
    expected = float(sums['loss']) / 8 + 0.2 * squares
    assert float(sums['objective']) == pytest.approx(expected, rel=1e-5)


def test_padding_has_no_part_in_the_loss(small, run, batch):
    steps, state, values = run(small(**NO_NORM, **QUIET))
    short = batch(size=8)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:4]]), short)
    padded['mask'] = jnp.arange(12) < 8
    train = jax.jit(steps.train)
    (a, a_sums), (b, b_sums) = train(state, short, values), train(state, padded, values)
    close(a.params, b.params, rtol=1e-5, atol=1e-6)
    assert a_sums['count'] == b_sums['count'] == 8


def test_accumulation_gives_the_gradient_of_the_whole_batch(small, run, batch):
    whole = small(optimizer__name='sgd', **NO_NORM, **QUIET)
    parts = cfg.replace(whole, {'optimizer.accumulate': 4})
    results = []
    for config in (whole, parts):
        steps, state, values = run(config)
        results.append(jax.jit(steps.train)(state, batch(), values))
    (a, a_sums), (b, b_sums) = results
    close(a.params, b.params, rtol=1e-5, atol=1e-6)
    close(a_sums, b_sums, rtol=1e-5)


def test_average_of_the_weights_follows_its_recurrence(small, run, batch):
    steps, state, values = run(small(train__ema=0.9))
    start = params.flatten(state.params)
    new, _ = jax.jit(steps.train)(state, batch(), values)
    after = params.flatten(new.params)
    expected = {path: 0.9 * start[path] + 0.1 * after[path] for path in after}
    close(new.ema, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_uses_the_averaged_weights(small, run, batch):
    steps, state, values = run(small(train__ema=0.5))
    averaged = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    assert float(steps.evaluate(state, batch(), values)['loss']) == float(
        steps.evaluate(averaged, batch(), values)['loss']
    )


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(small, run, batch):
    losses = {}
    for dtype in ('float32', 'bfloat16'):
        steps, state, values = run(small(model__dtype=dtype, **QUIET))
        new, sums = jax.jit(steps.train)(state, batch(), values)
        assert {leaf.dtype for leaf in jax.tree.leaves(new.params)} == {jnp.dtype('float32')}
        losses[dtype] = float(sums['loss'])
    assert losses['bfloat16'] == pytest.approx(losses['float32'], rel=0.05)
    assert losses['bfloat16'] != losses['float32']


def test_evaluation_changes_with_nothing_but_the_state(small, run, batch):
    steps, state, values = run(small())
    first = jax.jit(steps.evaluate)(state, batch(), values)
    again = jax.jit(steps.evaluate)(state, batch(), values | {'seed': np.uint32(9)})
    assert same(first, again)


def test_training_lowers_the_loss(small, run, batch):
    steps, state, values = run(small(**QUIET))
    train = jax.jit(steps.train)
    first = steps.evaluate(state, batch(), values)['loss']
    for _ in range(60):
        state, sums = train(state, batch(), values)
    assert float(sums['loss']) < 0.3 * float(first)


def test_sigmoid_needs_two_classes(small, run):
    with pytest.raises(UserError, match='a sigmoid for two classes, but the data have 3'):
        run(small(model__outputs=1))


def test_images_too_small_for_the_network_are_named(small, run):
    with pytest.raises(UserError, match='at least'):
        run(small(model__padding='VALID'), shape=(4, 4, 1))
