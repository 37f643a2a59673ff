"""Batch statistics estimated again: those of all batches together, by NumPy."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from cnn_jax import params
from cnn_jax.train import precise_norm

BATCHES = 5


def test_pooled_statistics_are_those_of_all_values():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(BATCHES, 40, 3)) * [1, 5, 0.1] + draw.normal(size=(BATCHES, 1, 3))
    pooled = {'norm': {'mean': np.full(3, 7.0), 'var': np.full(3, 9.0)}}  # of no batch yet
    for number, batch in enumerate(values, start=1):
        own = {'norm': {'mean': batch.mean(axis=0), 'var': batch.var(axis=0)}}
        pooled = precise_norm.pooled(pooled, jax.tree.map(np.float32, own), np.int32(number))
    whole = values.reshape(-1, 3)
    np.testing.assert_allclose(pooled['norm']['mean'], whole.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(pooled['norm']['var'], whole.var(axis=0), rtol=1e-5)


@pytest.fixture
def estimated(run, batch):
    """A state some steps on, with statistics of the evaluated weights."""

    def make(config, count=BATCHES):
        steps, state, values = run(config)
        for number in range(3):
            state, _ = jax.jit(steps.train)(state, batch(number), values)
        estimate, batches = jax.jit(steps.estimate), map(batch, itertools.count())
        taken = itertools.islice(batches, count)
        new = precise_norm.renewed(estimate, state, taken, values)
        assert estimate._cache_size() == 1
        return steps, state, new, values

    return make


def first_layer(weights, images):
    """What the first normalization sees: convolution 3×3 SAME, bias, ReLU, in NumPy."""
    x = np.pad(np.float64(images) / 127.5 - 1, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    kernel = np.float64(weights['block1_conv1/kernel'])
    out = np.einsum('bhwcij,ijco->bhwo', windows, kernel)
    return np.maximum(out + np.float64(weights['block1_conv1/bias']), 0)


@pytest.mark.parametrize('average', [{}, {'train__ema': 0.5}])
def test_they_are_the_statistics_of_the_evaluated_weights_over_all_batches(
    small, estimated, batch, average
):
    _, _, state, _ = estimated(small(train__precise_norm=BATCHES, **average))
    seen = np.concatenate([np.asarray(batch(number)['image']) for number in range(BATCHES)])
    out = first_layer(params.flatten(state.evaluated['params']), seen)
    found = params.flatten(state.precise)
    name = next(path for path in found if path.startswith('block1') and path.endswith('1/mean'))
    np.testing.assert_allclose(found[name], out.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    variance = found[name.replace('mean', 'var')]
    np.testing.assert_allclose(variance, out.var(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)


def test_evaluation_uses_them_and_training_does_not(small, estimated, batch):
    steps, before, after, values = estimated(small(train__precise_norm=BATCHES))
    assert float(steps.evaluate(before, batch(), values)['loss']) != float(
        steps.evaluate(after, batch(), values)['loss']
    )
    a, _ = jax.jit(steps.train)(before, batch(9), values)
    b, _ = jax.jit(steps.train)(after, batch(9), values)
    b = dataclasses.replace(b, precise=a.precise)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_frozen_statistics_keep_their_bits(small, estimated):
    config = small(train__precise_norm=BATCHES, train__frozen=('block1_*',))
    _, before, after, _ = estimated(config)
    old, new = params.flatten(before.batch_stats), params.flatten(after.precise)
    for path in old:
        assert np.array_equal(old[path], new[path]) == path.startswith('block1_'), path


def test_a_network_without_batch_statistics_has_none_to_estimate(small, estimated):
    config = small(train__precise_norm=2, model__norm='none', model__head_norm='none')
    _, _, state, _ = estimated(config)
    assert state.precise == {}


@pytest.mark.parametrize('norm', ['batch', 'ghost', 'renorm'])
def test_they_are_the_statistics_of_what_each_layer_sees_in_inference(
    small, estimated, batch, norm
):
    """Of one batch, so that every layer above was normalized by the same numbers."""
    kinds = {'model__norm': norm, 'model__head_norm': norm, 'model__ghost_batch': 2}
    steps, _, state, values = estimated(small(train__precise_norm=1, **kinds), count=1)
    found, seen = params.flatten(state.precise), {}

    def look(call, args, kwargs, context):
        path = '/'.join(context.module.path)
        if f'{path}/mean' in found:
            seen[path] = np.float64(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        steps.evaluate(state, batch(0), values)
    assert len(seen) == 5
    for path, x in seen.items():
        axes = tuple(range(x.ndim - 1))
        for name, expected in (('mean', x.mean(axes)), ('var', x.var(axes))):
            np.testing.assert_allclose(found[f'{path}/{name}'], expected, rtol=1e-3, atol=1e-4)
