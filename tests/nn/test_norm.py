"""Norms against Keras, against their formulas in NumPy, and their derivatives of every order."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.test_util import check_grads

from cnn_jax.errors import UserError
from cnn_jax.nn import (
    BatchNorm,
    BatchRenorm,
    GhostBatchNorm,
    GroupNorm,
    batch_normalize,
    group_normalize,
)
from cnn_jax.nn.cpu import compiling_for, sum_pair
from tests.environments import on_devices

SHAPE = (8, 5, 4, 3)
WIDE = {'r_max': 1e6, 'd_max': 1e6}


def batches(count, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return [(2 * rng.normal(size=shape) + 3).astype(np.float32) for _ in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def train(layer, variables, x):
    return layer.apply(variables, x, train=True, mutable=['batch_stats'])


def theirs(call, *args, **kwargs):
    """What Keras computes, which promotes as it likes."""
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        return call(*args, **kwargs)


@pytest.mark.parametrize('shape', [(8, 5, 6, 4), (16, 4)])
def test_batch_norm_agrees_with_keras_in_training_and_inference(shape):
    layer = keras.layers.BatchNormalization(momentum=0.9)
    ours = BatchNorm(momentum=0.9)
    first, *rest = batches(6, shape)
    variables = ours.init(jax.random.key(0), first, train=True)
    layer.build(shape)
    scale, bias = np.arange(1, 5, dtype=np.float32), np.arange(4, dtype=np.float32)
    layer.gamma.assign(scale)
    layer.beta.assign(bias)
    variables = {**variables, 'params': {'scale': scale, 'bias': bias}}

    for x in rest:
        y, updated = train(ours, variables, x)
        variables |= updated
        np.testing.assert_allclose(y, theirs(layer, x, training=True), rtol=1e-4, atol=1e-5)
    averages = variables['batch_stats']
    np.testing.assert_allclose(averages['mean'], layer.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(averages['var'], layer.moving_variance, rtol=1e-5)
    y = ours.apply(variables, first, train=False)
    np.testing.assert_allclose(y, theirs(layer, first, training=False), rtol=1e-5, atol=1e-5)
    assert (BatchNorm().momentum, BatchNorm().epsilon) == (0.99, layer.epsilon)


def test_one_compilation_serves_every_momentum_and_every_limit():
    x, variables = batches(1)[0], renorm_state(0.5)

    @jax.jit
    def step(momentum, r_max, d_max):
        layer = BatchRenorm(momentum=momentum, r_max=r_max, d_max=d_max)
        return layer.apply(variables, x, train=True, mutable='batch_stats')

    old = variables['batch_stats']['mean']
    for momentum, r_max, d_max in ((0.0, 1.0, 0.0), (0.5, 3.0, 5.0), (1.0, 1e6, 1e6)):
        y, updated = step(momentum, r_max, d_max)
        assert np.isfinite(y).all()
        expected = momentum * old + (1 - momentum) * x.mean((0, 1, 2))
        np.testing.assert_allclose(updated['batch_stats']['mean'], expected, rtol=1e-5)
    assert step._cache_size() == 1


def test_flax_spells_the_mode_the_other_way_round():
    x = batches(1)[0]
    for layer in (BatchNorm(), GhostBatchNorm(group_size=4), BatchRenorm()):
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        ours = layer.apply(variables, x, train=True, mutable='batch_stats')
        flax = layer.apply(variables, x, use_running_average=False, mutable='batch_stats')
        jax.tree.map(np.testing.assert_array_equal, ours, flax)
        with pytest.raises(TypeError, match='use_running_average'):
            layer.apply(variables, x)
        with pytest.raises(TypeError, match='either'):
            layer.apply(variables, x, train=True, use_running_average=True)


def test_without_scale_and_bias_there_are_no_parameters():
    x = batches(1, (8, 3))[0]
    variables = BatchNorm(use_scale=False, use_bias=False).init(jax.random.key(0), x, train=True)
    assert 'params' not in variables
    only_bias = BatchNorm(use_scale=False).init(jax.random.key(0), x, train=True)
    assert list(only_bias['params']) == ['bias']


def test_the_type_of_the_result_may_be_chosen():
    x = jnp.ones((2, 3), jnp.bfloat16)
    layer = BatchNorm(dtype='float32')
    assert layer.init_with_output(jax.random.key(0), x, train=False)[0].dtype == jnp.float32


def along(axes):
    return lambda x, *params: batch_normalize(x, *params, axes, 1e-3)


def in_groups(groups):
    return lambda x, *params: (group_normalize(x, *params, groups, 1e-3),)


CASES = [
    ('cpu', (2, 4, 3, 5), [(5,), (5,)], along((0, 1, 2))),
    ('gpu', (2, 4, 3, 5), [(5,), (5,)], along((0, 1, 2))),
    ('cpu', (3, 2, 4), [(2,), (2,)], along((0, 2))),
    ('cpu', (2, 2, 3, 2, 2), [(2, 2), (2, 2)], along((1, 2, 3))),  # ghost
    ('cpu', (3, 2, 3, 4), [(4,), (4,)], in_groups(2)),
    ('cpu', (3, 4), [(4,), (4,)], in_groups(1)),
]


@pytest.mark.parametrize(('platform', 'shape', 'parameters', 'function'), CASES)
def test_derivatives_of_both_modes_and_orders(platform, shape, parameters, function):
    """Through the output and through both statistics, in float64."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) + 1 for s in (shape, *parameters)]

    @jax.jit
    def wavy(x, scale, bias):
        return [jnp.sin(v) for v in function(x, scale, bias)]

    with jax.enable_x64(True), compiling_for(platform):
        assert wavy(*arrays)[0].dtype == np.float64
        check_grads(wavy, arrays, order=2, modes=['fwd', 'rev'], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ('function', 'axes'),
    [(along((0, 1, 2)), (0, 0)), (along((0, 1, 2)), (0, None)), (in_groups(3), (None, 0))],
    ids=['batch', 'batch of one scale', 'group of one input'],
)
def test_every_derivative_of_many_models_at_once_is_that_of_each(function, axes):
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 4, 3, 2, 3)), rng.normal(size=(2, 3))
    args = [a if axis == 0 else a[0] for a, axis in zip((x, scale), axes)]

    def loss(x, scale):
        return jnp.sum(jnp.sin(function(x, scale, scale)[0]))

    def bent(x, scale):
        return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, scale))

    def shared(x, scale):
        return jnp.sum(jax.vmap(loss, axes)(x, scale) ** 2)

    def one_by_one(x, scale):
        pick = [[a[i] if axis == 0 else a for a, axis in zip((x, scale), axes)] for i in (0, 1)]
        return sum(loss(*each) ** 2 for each in pick)

    with jax.enable_x64(True):
        for derivative in (jax.grad(loss, (0, 1)), jax.grad(bent, (0, 1))):
            at_once = jax.jit(jax.vmap(derivative, axes))(*args)
            alone = jax.jit(derivative)
            each = [
                alone(*(a[i] if axis == 0 else a for a, axis in zip(args, axes))) for i in (0, 1)
            ]
            jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, np.stack(b)), at_once, *each)
        ours, plain = (jax.jit(jax.grad(f, (0, 1)))(*args) for f in (shared, one_by_one))
        jax.tree.map(np.testing.assert_allclose, ours, plain)


LAYERS = {
    'batch': (BatchNorm(momentum=0.0, epsilon=1e-12), (0, 1, 2)),
    'ghost': (GhostBatchNorm(group_size=8, epsilon=1e-12), (1, 2, 3)),
    'renorm': (BatchRenorm(epsilon=1e-12, r_max=1.0, d_max=0.0), (0, 1, 2)),
    'group': (GroupNorm(2, epsilon=1e-12), (1, 2, 4)),
    'instance': (GroupNorm(None, epsilon=1e-12), (1, 2)),
}
SPLIT = {'ghost': (2, 8, 6, 5, 4), 'group': (16, 6, 5, 2, 2)}


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', LAYERS)
def test_a_large_mean_costs_no_digits(name, dtype, platform):
    """Output and gradient against two passes in float64; deviation 0.1."""
    layer, axes = LAYERS[name]
    draw = np.random.default_rng(0)
    noise, dy = draw.normal(size=(2, 16, 6, 5, 4))
    variables = layer.init(jax.random.key(0), noise.astype(np.float32), train=True)

    @jax.jit
    def run(x, dy):
        def apply(x):
            y, updated = layer.apply(variables, x, train=True, mutable='batch_stats')
            assert y.dtype == dtype
            return y.astype(jnp.float32), updated

        y, pull, updated = jax.vjp(apply, x, has_aux=True)
        return y, pull(dy)[0], updated

    for ratio in (1, 1e2, 1e4):
        x = jnp.asarray(0.1 * (noise + ratio), dtype)
        with compiling_for(platform):
            y, dx, updated = run(x, dy.astype(np.float32))
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} <= {np.dtype('float32')}
        split = SPLIT.get(name, x.shape)
        wide, slope = (np.asarray(a, np.float64).reshape(split) for a in (x, dy))
        mean = functools.partial(np.mean, axis=axes, keepdims=True)
        var = mean((wide - mean(wide)) ** 2)
        exact = (wide - mean(wide)) / np.sqrt(var + 1e-12)
        gradient = (slope - mean(slope) - exact * mean(slope * exact)) / np.sqrt(var + 1e-12)
        for ours, right in ((y, exact), (dx, gradient)):
            error = np.max(abs(np.asarray(ours, np.float64).reshape(right.shape) - right))
            tolerance = 2e-5 if dtype == 'float32' else 2**-7
            assert error <= tolerance * np.max(abs(right)), (ratio, error)
        if name == 'batch':
            ours = updated['batch_stats']['var']
            np.testing.assert_allclose(ours, var.ravel(), rtol=2e-5, atol=1e-9)


SHARED = r"""
import jax, numpy as np, re
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from cnn_jax.nn import batch_normalize
from cnn_jax.nn.cpu import compiling_for
mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))
split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (('data',), ()))
x = (0.1 * (np.random.default_rng(0).normal(size=(16, 12, 12, 4)) + 1e4)).astype(np.float32)
ones, wide = np.ones(4, np.float32), np.asarray(x, np.float64)
normalize = lambda x, ones: batch_normalize(x, ones, ones, (0, 1, 2), 1e-12)
loss = lambda x, ones: (normalize(x, ones)[0] ** 3).sum()
function = lambda x, ones: (normalize(x, ones), jax.grad(loss)(x, ones))
right = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2)) + 1
for platform in ('cpu', 'gpu'):
    with compiling_for(platform):
        compiled = jax.jit(function, in_shardings=(split, whole)).lower(x, ones).compile()
        (y, mean, var), dx = compiled(x, ones)
        alone = jax.jit(function)(x, ones)[1]
    np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=2e-5)
    np.testing.assert_allclose(y, right, atol=1e-4)
    np.testing.assert_allclose(dx, alone, atol=1e-4 * abs(alone).max())
    collective = r'= (.*?) (?:all-|collective-|reduce-scatter)\S*\('
    exchanged = re.findall(collective, compiled.as_text())
    shapes = re.findall(r'\[([\d,]+)\]', ' '.join(exchanged))
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in shapes]
    assert 0 < max(sizes) <= 8 * 4, exchanged
"""


def test_devices_that_share_a_batch_have_its_statistics_and_exchange_no_images():
    on_devices(8, SHARED)


def test_a_constant_input_is_finite_with_its_gradient():
    x = jnp.full((8, 2), 1e3)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    y, gradient = jax.value_and_grad(lambda x: train(BatchNorm(), variables, x)[0].sum())(x)
    assert np.isfinite(y)
    assert np.isfinite(gradient).all()


# Ghost batch norm is batch norm, group by group.


def ghost_case(shape):
    x = batches(1, shape)[0]
    drawn = BatchNorm().init(jax.random.key(0), x, train=True)
    return x, {**drawn, 'params': {'scale': jnp.arange(1.0, 4), 'bias': jnp.arange(3.0)}}


@pytest.mark.parametrize('shape', [(12, 5, 4, 3), (12, 3)], ids=str)
def test_each_group_is_normalized_as_a_batch_of_its_own(shape):
    x, variables = ghost_case(shape)
    y, updated = train(GhostBatchNorm(group_size=4, momentum=0.0), variables, x)
    alone = [train(BatchNorm(momentum=0.0), variables, part) for part in np.split(x, 3)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in alone]), rtol=1e-5, atol=1e-5)
    for name, average in updated['batch_stats'].items():
        expected = np.mean([stats['batch_stats'][name] for _, stats in alone], axis=0)
        np.testing.assert_allclose(average, expected, rtol=1e-5)
    inference = GhostBatchNorm(group_size=5).apply(variables, x, train=False)
    np.testing.assert_array_equal(inference, BatchNorm().apply(variables, x, train=False))


@pytest.mark.parametrize('layer', [GhostBatchNorm(group_size=5), GroupNorm(4)], ids=str)
def test_groups_that_do_not_divide_are_a_mistake(layer):
    with pytest.raises(UserError, match='must divide'):
        layer.init(jax.random.key(0), batches(1, (12, 3, 3, 6))[0], train=True)


# Batch renorm lies between batch norm and inference, and warms up from the former.


def renorm_state(share):
    averages = {'mean': jnp.array([1.0, 4, -20]), 'var': jnp.array([5.0, 0.1, 2])}
    return {
        'params': {'scale': jnp.arange(1.0, 4), 'bias': jnp.arange(3.0)},
        'batch_stats': averages | {'share': jnp.float32(share)},
    }


def batch_norm_state():
    averages = {k: v for k, v in renorm_state(1)['batch_stats'].items() if k != 'share'}
    return {**renorm_state(1), 'batch_stats': averages}


@pytest.mark.parametrize(
    ('limits', 'share'), [({'r_max': 1.0, 'd_max': 0.0}, 1.0), (WIDE, 0.0)], ids=str
)
def test_without_correction_batch_renorm_is_batch_norm(limits, share):
    """r = 1 and d = 0, by the limits or because the averages have seen nothing."""
    x = batches(1)[0]
    y, updated = train(BatchRenorm(**limits), renorm_state(share), x)
    expected, stats = train(BatchNorm(), batch_norm_state(), x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    for name, average in stats['batch_stats'].items():
        np.testing.assert_array_equal(updated['batch_stats'][name], average)


def test_without_limits_training_gives_what_inference_gives():
    x = batches(1)[0]
    y, _ = train(BatchRenorm(**WIDE), renorm_state(1.0), x)
    inference = BatchRenorm().apply(renorm_state(1.0), x, train=False)
    np.testing.assert_array_equal(inference, BatchNorm().apply(batch_norm_state(), x, train=False))
    np.testing.assert_allclose(y, inference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('share', [0.25, 1.0])
def test_limits_follow_the_formula(share):
    """One channel within the limits, one that meets r's, one that meets d's."""
    x, epsilon, r_max, d_max = batches(1)[0], 1e-3, 3.0, 5.0
    y, _ = train(BatchRenorm(r_max=r_max, d_max=d_max), renorm_state(share), x)
    wide, state = np.asarray(x, np.float64), renorm_state(1)['batch_stats']
    mean, var = (np.asarray(state[k], np.float64) for k in ('mean', 'var'))
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
    x, layer = batches(1)[0], BatchRenorm(momentum=0.9)
    variables, other = (layer.init(jax.random.key(0), x, train=t) for t in (True, False))
    jax.tree.map(np.testing.assert_array_equal, variables, other)
    for step in range(4):
        np.testing.assert_allclose(variables['batch_stats']['share'], 1 - 0.9**step, rtol=1e-5)
        mean = (1 - 0.9**step) * x.mean((0, 1, 2))
        np.testing.assert_allclose(variables['batch_stats']['mean'], mean, rtol=1e-4)
        variables |= train(layer, variables, x)[1]


def test_no_gradient_passes_through_the_corrections():
    """∂y/∂x is that of the formula in which r and d are numbers."""
    x = np.random.default_rng(0).normal(size=(6, 3)) + 1
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), renorm_state(1.0))
        mu, sigma = x.mean(0), np.sqrt(x.var(0) + 1e-3)
        running = variables['batch_stats']
        std = np.sqrt(running['var'] + 1e-3)
        r, d = np.clip(sigma / std, 1 / 3, 3), np.clip((mu - running['mean']) / std, -5, 5)
        scale, bias = (variables['params'][name] for name in ('scale', 'bias'))

        def fixed(x):
            centred = x - x.mean(0, keepdims=True)
            standard = centred / jnp.sqrt((centred**2).mean(0, keepdims=True) + 1e-3)
            return jnp.sin((scale * r)[None] * standard + (scale * d + bias)[None])

        def ours(x):
            return jnp.sin(train(BatchRenorm(), variables, x)[0])

        np.testing.assert_allclose(jax.jacrev(ours)(x), jax.jacrev(fixed)(x), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(jax.jacfwd(ours)(x), jax.jacfwd(fixed)(x), rtol=1e-6, atol=1e-8)


# Group, layer and instance norm.


def apply_group(groups, x, scale, bias):
    return GroupNorm(groups).apply({'params': {'scale': scale, 'bias': bias}}, x, train=True)


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
@pytest.mark.parametrize('shape', [(4, 5, 3, 6), (4, 6), (2, 7, 6)])
def test_group_norm_agrees_with_keras(shape, groups):
    if len(shape) == 2 and groups == shape[-1]:
        groups = 1  # one number a group says nothing
    x, c = batches(1, shape)[0], shape[-1]
    scale, bias = np.arange(1, c + 1, dtype=np.float32), np.arange(c, dtype=np.float32)
    y = apply_group(groups, x, scale, bias)

    layer = keras.layers.GroupNormalization(groups)
    layer.build(shape)
    layer.gamma.assign(scale)
    layer.beta.assign(bias)
    np.testing.assert_allclose(y, theirs(layer, x), rtol=1e-4, atol=1e-4)


def test_one_group_is_keras_layer_normalization_and_none_a_group_for_each_channel():
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    for shape, axes in (((4, 5, 3, 6), (1, 2, 3)), ((4, 6), -1)):
        x = batches(1, shape)[0]
        layer = keras.layers.LayerNormalization(axes, center=False, scale=False)
        ours = apply_group(1, x, ones, zeros)
        np.testing.assert_allclose(ours, theirs(layer, x), rtol=1e-4, atol=1e-4)
    x = batches(1, (4, 5, 3, 6))[0]
    np.testing.assert_array_equal(apply_group(None, x, ones, zeros), apply_group(6, x, ones, zeros))


def test_no_example_sees_another_and_training_is_inference():
    x = batches(1, (4, 5, 3, 6))[0]
    layer = GroupNorm(2)
    variables = layer.init(jax.random.key(0), x, train=True)
    assert list(variables) == ['params']
    together = layer.apply(variables, x, train=True)
    np.testing.assert_array_equal(together, layer.apply(variables, x, train=False))
    np.testing.assert_allclose(layer.apply(variables, x[2:3]), together[2:3], rtol=1e-5, atol=1e-5)


# Sums as a CPU takes them, and as others do.

PAIRS = [((4, 3), (0,)), ((2, 5, 7, 3), (0, 1, 2)), ((2, 5, 7, 3), (1, 2)), ((2, 5, 7, 3), (0, 3))]


@pytest.mark.parametrize(('platform', 'paired'), [('cpu', True), ('gpu', True), ('tpu', False)])
@pytest.mark.parametrize(('shape', 'axes'), PAIRS)
def test_paired_sums_agree_with_float64_on_every_platform(platform, paired, shape, axes):
    u, v = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in (0, 1))
    with compiling_for(platform):
        sums = sum_pair(jnp.array(u), jnp.array(v), axes, paired)
    for found, array in zip(sums, (u, v)):
        expected = array.astype(np.float64).sum(axis=axes)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
