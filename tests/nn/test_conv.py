"""Convolution and pooling: NumPy in float64, Keras, and derivatives of every order."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from cnn_jax.errors import UserError
from cnn_jax.nn import (
    Conv,
    avg_pool,
    conv2d,
    global_avg_pool,
    max_pool,
    output_shape,
    resolve_padding,
    standardize_kernel,
)
from cnn_jax.nn.conv import add_bias
from cnn_jax.nn.cpu import broadcast_channels, compiling_for

PAD_MODES = {'CIRCULAR': 'wrap', 'REFLECT': 'reflect'}


def convolve(x, kernel, stride, padding, dilation, groups):
    """The definition, in float64: a sum for each output pixel, feature by feature."""
    pads = resolve_padding(padding, x.shape[1:3], kernel.shape[:2], stride, dilation)
    x = np.pad(x, ((0, 0), *pads, (0, 0)), mode=PAD_MODES.get(padding, 'constant'))
    (sy, sx), (dy, dx), (kh, kw, depth, features) = stride, dilation, kernel.shape
    height = (x.shape[1] - dy * (kh - 1) - 1) // sy + 1
    width = (x.shape[2] - dx * (kw - 1) - 1) // sx + 1
    y = np.zeros((x.shape[0], height, width, features))
    for i in range(height):
        for j in range(width):
            rows, columns = i * sy + dy * np.arange(kh), j * sx + dx * np.arange(kw)
            patch = x[:, rows][:, :, columns]
            for f in range(features):
                first = f // (features // groups) * depth
                window = patch[..., first : first + depth]
                y[:, i, j, f] = np.sum(window * kernel[..., f], axis=(1, 2, 3))
    return y


def axes(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@settings(max_examples=25, deadline=None)
@given(
    size=axes(1, 9),
    kernel=axes(1, 4),
    stride=axes(1, 3),
    dilation=axes(1, 2),
    padding=st.sampled_from(['VALID', 'SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT']),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_definition_in_float64(
    size, kernel, stride, dilation, padding, groups, seed
):
    try:
        shape = output_shape(size, kernel, stride, dilation, padding)
    except UserError:
        assume(False)
    rng = np.random.default_rng(seed)
    x, taps = rng.normal(size=(2, *size, 4)), rng.normal(size=(*kernel, 4 // groups, 6))
    with jax.enable_x64(True):
        y = conv2d(x, taps, stride=stride, padding=padding, dilation=dilation, groups=groups)
    assert y.shape == (2, *shape, 6)
    np.testing.assert_allclose(
        y, convolve(x, taps, stride, padding, dilation, groups), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize('kernel', [2, 3, 5])
@pytest.mark.parametrize('size', [9, 10])
def test_agrees_with_keras(size, kernel, stride, dilation, padding):
    rng = np.random.default_rng(0)
    x, taps, bias = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, size, size, 4), (kernel, kernel, 4, 6), (6,))
    )
    layer = Conv(6, kernel, stride, padding, dilation)
    ours = layer.apply({'params': {'kernel': taps, 'bias': bias}}, x)
    theirs = keras.ops.conv(x, taps, stride, padding.lower(), dilation_rate=dilation)
    theirs = np.asarray(theirs) + bias
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('platform', 'size', 'options'),
    [
        ('cpu', (5, 6), {'stride': 2, 'padding': 'SAME'}),
        ('cpu', (5, 6), {'groups': 2, 'padding': 'CIRCULAR'}),
        ('cpu', (5, 6), {'stride': (2, 1), 'padding': 'REFLECT'}),
        ('cpu', (2, 5), {'stride': 2, 'dilation': 2, 'padding': 'SAME'}),  # larger than the image
        ('gpu', (5, 6), {'dilation': 2, 'padding': ((2, 0), (1, 1))}),
    ],
    ids=str,
)
def test_derivatives_of_both_modes_and_orders(platform, size, options):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, 4)), rng.normal(size=(3, 3, 4, 2))
    kernel = kernel[:, :, : 4 // options.get('groups', 1)]
    wavy = jax.jit(lambda x, k: jnp.sin(conv2d(x, k, **options)))
    with jax.enable_x64(True), compiling_for(platform):
        check_grads(wavy, (x, kernel), order=2, modes=['fwd', 'rev'], rtol=1e-3, atol=1e-3)


def plain(x, kernel, stride, padding, dilation):
    """What XLA makes of the definition, its gradients included."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        resolve_padding(padding, x.shape[1:3], kernel.shape[:2], stride, dilation),
        rhs_dilation=dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


@settings(max_examples=12, deadline=None)
@given(
    size=axes(1, 9),
    kernel=axes(1, 4),
    stride=axes(1, 3),
    dilation=axes(1, 2),
    padding=st.sampled_from(['VALID', 'SAME', 'SAME_TORCH', 2]),
    channels=st.sampled_from([1, 4]),
)
def test_every_lowering_has_the_plain_ones_value_and_gradients(
    size, kernel, stride, dilation, padding, channels
):
    """In float64 and float32, against the plain one in float64."""

    def outcome(convolve, *args):
        loss = jax.grad(lambda *args: jnp.sum(jnp.sin(convolve(*args))), (0, 1))
        return convolve(*args), loss(*args)

    try:
        output_shape(size, kernel, stride, dilation, padding)
    except UserError:
        assume(False)
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(2, *size, channels)), rng.normal(size=(*kernel, channels, 3))
    ours = functools.partial(conv2d, stride=stride, padding=padding, dilation=dilation)
    theirs = functools.partial(plain, stride=stride, padding=padding, dilation=dilation)
    with jax.enable_x64(True):
        exact = jax.jit(functools.partial(outcome, theirs))(*arrays)
        for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 2e-4)):
            given = jax.jit(functools.partial(outcome, ours))(*(a.astype(dtype) for a in arrays))
            for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(exact), strict=True):
                assert a.dtype == dtype
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('axes', [(0, 0), (0, None), (None, 0)], ids=str)
@pytest.mark.parametrize('channels', [1, 4])
def test_models_that_share_an_operand_share_its_derivatives(axes, channels):
    """Gradients of a `vmap`, and theirs, by the convolutions that JAX differentiates itself."""
    rng = np.random.default_rng(0)
    args = rng.normal(size=(2, 2, 7, 6, channels)), rng.normal(size=(2, 3, 3, channels, 2))
    args = [a if axis == 0 else a[0] for a, axis in zip(args, axes)]

    def derivatives(convolve):
        def together(*args):
            return jnp.sum(jnp.sin(jax.vmap(convolve, axes)(*args)))

        def bent(*args):
            return sum(jnp.sum(g**3) for g in jax.grad(together, (0, 1))(*args))

        return jax.jit(lambda *args: (jax.grad(together)(*args), jax.grad(bent, (0, 1))(*args)))

    with jax.enable_x64(True):
        ours = derivatives(lambda x, k: conv2d(x, k, stride=2, padding='SAME'))(*args)
        exact = derivatives(lambda x, k: plain(x, k, (2, 2), 'SAME', (1, 1)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), ours, exact)


@pytest.mark.parametrize('shape', [(5, 3), (4, 6, 3), (2, 5, 7, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_the_gradient_of_a_bias_is_the_sum_of_what_it_was_added_to(shape, platform):
    x, dy = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in (0, 1))
    bias = jnp.arange(shape[-1], dtype=jnp.float32)
    with compiling_for(platform):
        y, pull_back = jax.vjp(add_bias, jnp.array(x), bias)
        dx, dbias = pull_back(jnp.array(dy))
        tangent = jax.jvp(add_bias, (x, bias), (dy, bias))[1]
    expected = np.asarray(x) + np.asarray(bias)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_array_equal(tangent, np.asarray(dy) + np.asarray(bias))
    exact = dy.astype(np.float64).sum(axis=tuple(range(len(shape) - 1)))
    np.testing.assert_allclose(dbias, exact, rtol=1e-5, atol=1e-5)


def test_parameters_have_keras_names_shapes_and_are_float32():
    def shapes(layer):
        x = jnp.zeros((1, 9, 9, 4))
        params = jax.eval_shape(layer.init, jax.random.key(0), x)['params']
        return {name: (leaf.shape, leaf.dtype) for name, leaf in params.items()}

    float32 = np.dtype('float32')
    grouped = {'kernel': ((3, 5, 2, 6), float32), 'bias': ((6,), float32)}
    assert shapes(Conv(6, (3, 5), feature_group_count=2)) == grouped
    assert shapes(Conv(6, use_bias=False)) == {'kernel': ((3, 3, 4, 6), float32)}


def test_kernels_start_he_normal_as_in_keras():
    fan_in = 3 * 3 * 64
    ours = Conv(256).init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))['params']['kernel']
    theirs = np.asarray(keras.initializers.HeNormal(seed=0)((3, 3, 64, 256)))
    for draws in (ours, theirs):
        assert abs(float(draws.mean())) < 4 * (2 / fan_in / draws.size) ** 0.5
        np.testing.assert_allclose(draws.std(), (2 / fan_in) ** 0.5, rtol=0.01)
        # Both cut at two deviations of the normal before it is cut: 2/0.8796 of those after.
        assert 2.2 < abs(draws).max() / draws.std() < 2 / 0.8796 * 1.01


def test_bfloat16_computes_in_bfloat16_and_stays_close():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    params = Conv(6).init(jax.random.key(1), x)
    half = Conv(6, dtype='bfloat16').apply(params, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), Conv(6).apply(params, x), atol=0.05)


@pytest.mark.parametrize(('channels', 'features'), [(3, 4), (4, 3)])
def test_groups_must_divide_channels_and_features(channels, features):
    with pytest.raises(UserError, match='2 groups'):
        Conv(features, feature_group_count=2).init(
            jax.random.key(0), jnp.zeros((1, 4, 4, channels))
        )


# A standardized kernel has mean 0 and variance 1 a filter, and so has its gradient its laws.


def draw_kernel(shape=(3, 3, 4, 5), seed=0):
    return (np.random.default_rng(seed).normal(size=shape) + 0.5).astype(np.float32)


@pytest.mark.parametrize('shape', [(3, 3, 4, 5), (7, 7, 1, 2), (1, 1, 8, 3)])
def test_each_filter_has_mean_0_and_variance_1(shape):
    w = np.asarray(standardize_kernel(draw_kernel(shape)), np.float64)
    np.testing.assert_allclose(w.mean((0, 1, 2)), np.zeros(shape[-1]), atol=1e-6)
    np.testing.assert_allclose(w.var((0, 1, 2)), np.ones(shape[-1]), rtol=1e-3)


def test_a_constant_filter_becomes_zero_with_a_finite_gradient():
    w = jnp.full((3, 3, 4, 5), 0.25)
    np.testing.assert_array_equal(standardize_kernel(w), np.zeros_like(w))
    gradient = jax.grad(lambda w: (standardize_kernel(w) * draw_kernel()).sum())(w)
    assert np.isfinite(gradient).all()


def test_the_gradient_agrees_with_finite_differences_and_leaves_mean_and_scale():
    """It is orthogonal to the constant filter, and nearly to w itself."""
    with jax.enable_x64(True):
        w = draw_kernel().astype(np.float64)
        check_grads(lambda w: jnp.sin(standardize_kernel(w)), (w,), order=2, modes=['fwd', 'rev'])
        gradient = np.asarray(jax.grad(lambda w: jnp.sin(standardize_kernel(w)).sum())(w))
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), np.zeros(5), atol=1e-9)
    centred = w - w.mean((0, 1, 2))
    np.testing.assert_allclose((gradient * centred).sum((0, 1, 2)), np.zeros(5), atol=1e-3)


def test_a_layer_convolves_with_it_and_draws_the_same_kernel():
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 4)).astype(np.float32)
    plain, layer = Conv(5), Conv(5, standardize=True)
    variables = layer.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, plain.init(jax.random.key(0), x))
    params = variables['params'] | {'kernel': standardize_kernel(variables['params']['kernel'])}
    np.testing.assert_allclose(layer.apply(variables, x), plain.apply({'params': params}, x))


# Pooling.

KERAS = {max_pool: keras.layers.MaxPooling2D, avg_pool: keras.layers.AveragePooling2D}


@pytest.mark.parametrize('pool', KERAS)
@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize(('window', 'stride'), [(2, None), (3, 2), ((2, 3), (1, 2))])
def test_agrees_with_keras_and_with_the_shape_function(pool, padding, window, stride):
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    y = pool(x, window, stride, padding)
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        theirs = KERAS[pool](window, stride, padding.lower())(x)
    np.testing.assert_allclose(y, theirs, rtol=1e-5)
    assert y.shape[1:3] == output_shape((7, 8), window, stride or window, 1, padding)


@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize(('window', 'stride'), [(2, 2), (3, 2), ((2, 3), (1, 2))])
def test_the_gradient_of_the_maximum_is_xla_s_own_ties_included(padding, window, stride):
    x = np.random.default_rng(0).integers(0, 4, (2, 7, 8, 3)).astype(np.float32)
    sizes = [(n, n) if isinstance(n, int) else n for n in (window, stride)]
    ours, theirs = (
        jax.grad(lambda x, pool=pool: jnp.sum(pool(x, *sizes, padding) ** 2))(x)
        for pool in (max_pool, nn.max_pool)
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize('pool', [max_pool, avg_pool])
def test_derivatives_of_both_modes_and_orders_also_of_many(pool, padding):
    x = np.random.default_rng(0).permutation(2 * 5 * 4).reshape(2, 5, 4, 1) / 10

    @jax.jit
    def wavy(x):
        return jnp.sin(pool(x, 2, 1, padding))

    with jax.enable_x64(True):
        check_grads(wavy, (x,), order=2, modes=['fwd', 'rev'], eps=1e-4, rtol=1e-3, atol=1e-3)
        gradient = jax.jit(jax.grad(lambda x: wavy(x).sum()))
        at_once = jax.jit(jax.vmap(gradient))(x[:, None])
        np.testing.assert_allclose(at_once[:, 0], gradient(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('pool', [max_pool, avg_pool])
def test_a_window_larger_than_the_image_is_refused(pool):
    with pytest.raises(UserError, match=rf'^{pool.__name__}: .*2×2.* input of 1×3'):
        pool(jnp.ones((1, 1, 3, 1)), 2)


@pytest.mark.parametrize('pool', [max_pool, avg_pool])
def test_a_pool_keeps_the_type_and_refuses_padding_that_it_does_not_have(pool):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert pool(jnp.ones((1, 4, 4, 1), dtype), 2).dtype == dtype
    for padding in ('REFLECT', 'CIRCULAR'):
        with pytest.raises(UserError, match=f'^{pool.__name__}: .*VALID or SAME'):
            pool(jnp.ones((1, 4, 4, 1)), 3, 1, padding)


@pytest.mark.parametrize(
    ('image', 'kernel', 'groups'),
    [
        ((1, 8, 8, 3), (3, 3, 1, 8), 1),
        ((1, 8, 8, 3), (3, 3, 4, 8), 1),
        ((1, 8, 8, 4), (3, 3, 2, 3), 2),
        ((8, 8, 3), (3, 3, 3, 8), 1),
        ((1, 8, 8, 3), (3, 3, 3), 1),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused(image, kernel, groups):
    with pytest.raises(UserError, match='they must be'):
        conv2d(jnp.ones(image), jnp.ones(kernel), groups=groups)


def test_sizes_may_be_numpys():
    x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    y = conv2d(x, kernel, stride=np.int64(2), padding=np.int64(1))
    assert y.shape == conv2d(x, kernel, stride=2, padding=1).shape


def test_a_biass_gradient_adds_up_in_float32():
    b = jnp.zeros(4, jnp.float16)
    gradient = jax.grad(lambda b: broadcast_channels(b, (64, 64, 1, 4)).astype(jnp.float32).sum())
    assert gradient(b).tolist() == [4096] * 4


def test_global_average():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    assert global_avg_pool(x).tolist() == [[3, 4]]
    many = jnp.full((1, 64, 64, 1), 1.0, jnp.bfloat16)
    assert global_avg_pool(many).dtype == jnp.bfloat16
    assert global_avg_pool(many) == 1
