"""Batch renormalization lies between batch norm and inference, and warms up from the former."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.nn.norm import BatchNorm, BatchRenorm

SHAPE = (8, 5, 4, 3)
WIDE = {'r_max': 1e6, 'd_max': 1e6}


def images(shape=SHAPE, seed=0):
    return (2 * np.random.default_rng(seed).normal(size=shape) + 3).astype(np.float32)


def state(share):
    averages = {'mean': jnp.array([1.0, 4, -20]), 'var': jnp.array([5.0, 0.1, 2])}
    return {
        'params': {'scale': jnp.arange(1.0, 4), 'bias': jnp.arange(3.0)},
        'batch_stats': averages | {'share': jnp.float32(share)},
    }


def batch_norm_state():
    averages = {k: v for k, v in state(1)['batch_stats'].items() if k != 'share'}
    return {**state(1), 'batch_stats': averages}


def train(layer, variables, x):
    return layer.apply(variables, x, train=True, mutable='batch_stats')


@pytest.mark.parametrize(
    ('limits', 'share'), [({'r_max': 1.0, 'd_max': 0.0}, 1.0), (WIDE, 0.0)], ids=str
)
def test_without_correction_it_is_batch_norm(limits, share):
    """r = 1 and d = 0, by the limits or because the averages have seen nothing."""
    x = images()
    y, updated = train(BatchRenorm(**limits), state(share), x)
    expected, stats = train(BatchNorm(), batch_norm_state(), x)
    np.testing.assert_array_equal(y, expected)
    for name, average in stats['batch_stats'].items():
        np.testing.assert_array_equal(updated['batch_stats'][name], average)


def test_without_limits_training_gives_what_inference_gives():
    x = images()
    y, _ = train(BatchRenorm(**WIDE), state(1.0), x)
    inference = BatchRenorm().apply(state(1.0), x, train=False)
    np.testing.assert_array_equal(inference, BatchNorm().apply(batch_norm_state(), x, train=False))
    np.testing.assert_allclose(y, inference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('share', [0.25, 1.0])
def test_limits_follow_the_formula(share):
    """One channel within the limits, one that meets r's, one that meets d's."""
    x, epsilon, r_max, d_max = images(), 1e-3, 3.0, 5.0
    y, _ = train(BatchRenorm(r_max=r_max, d_max=d_max), state(share), x)
    wide = np.asarray(x, np.float64)
    mean, var = (np.asarray(state(1)['batch_stats'][k], np.float64) for k in ('mean', 'var'))
    batch = wide.mean((0, 1, 2)), np.sqrt(wide.var((0, 1, 2)) + epsilon)
    running = mean, np.sqrt(var + epsilon)
    limit = 1 + (r_max - 1) * share
    r = np.clip(batch[1] / running[1], 1 / limit, limit)
    d = np.clip((batch[0] - running[0]) / running[1], -d_max * share, d_max * share)
    assert r[1] == limit
    assert d[2] == d_max * share
    expected = np.arange(1, 4) * ((wide - batch[0]) / batch[1] * r + d) + np.arange(3)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_the_share_that_stems_from_data_grows_as_the_averages_do():
    x, layer = images(), BatchRenorm(momentum=0.9)
    variables = layer.init(jax.random.key(0), x, train=True)
    assert variables['batch_stats']['share'] == 0
    for step in range(1, 4):
        variables |= train(layer, variables, x)[1]
        np.testing.assert_allclose(variables['batch_stats']['share'], 1 - 0.9**step, rtol=1e-5)
        np.testing.assert_allclose(
            variables['batch_stats']['mean'], (1 - 0.9**step) * x.mean((0, 1, 2)), rtol=1e-4
        )


def test_init_in_inference_makes_the_same_collections():
    x = images()
    ours, other = (BatchRenorm().init(jax.random.key(0), x, train=t) for t in (False, True))
    jax.tree.map(np.testing.assert_array_equal, ours, other)


def test_frozen_it_leaves_its_averages():
    _, updated = train(BatchRenorm(frozen=True), state(0.5), images())
    jax.tree.map(np.testing.assert_array_equal, updated['batch_stats'], state(0.5)['batch_stats'])


def test_no_gradient_passes_through_the_corrections():
    """∂y/∂x is that of the formula in which r and d are numbers."""
    x = np.random.default_rng(0).normal(size=(6, 3)) + 1
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state(1.0))
        mu, sigma = x.mean(0), np.sqrt(x.var(0) + 1e-3)
        running = variables['batch_stats']
        std = np.sqrt(running['var'] + 1e-3)
        r, d = np.clip(sigma / std, 1 / 3, 3), np.clip((mu - running['mean']) / std, -5, 5)
        scale, bias = (variables['params'][name] for name in ('scale', 'bias'))

        def fixed(x):
            centred = x - x.mean(0)
            standard = centred / jnp.sqrt((centred**2).mean(0) + 1e-3)
            return jnp.sin(scale * (standard * r + d) + bias)

        def ours(x):
            return jnp.sin(train(BatchRenorm(), variables, x)[0])

        np.testing.assert_allclose(jax.jacrev(ours)(x), jax.jacrev(fixed)(x), rtol=1e-6, atol=1e-8)


def test_one_compilation_serves_all_limits():
    traces = []

    @jax.jit
    def step(r_max, d_max):
        traces.append(r_max)
        return train(BatchRenorm(r_max=r_max, d_max=d_max), state(0.5), images())[0]

    outputs = [step(*limits) for limits in ((1.0, 0.0), (3.0, 5.0), (1e6, 1e6))]
    assert all(np.isfinite(y).all() for y in outputs)
    assert len(traces) == 1


def test_bfloat16_inputs_have_float32_statistics():
    y, updated = train(BatchRenorm(), state(0.5), jnp.asarray(images(), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in updated['batch_stats'].values()} == {np.dtype('float32')}
