"""The strided net against the same net in Keras's own layers, and what each field changes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.config import Model, fields_by_path
from cnn_jax.errors import UserError
from cnn_jax.models import StridedNet, feature_map_size, minimum_size

TINY = Model(stem_width=4, widths=(4, 4), hidden=(8,))
SMALL = Model(stem_width=0, widths=(32, 64), hidden=(128,))
FIELDS = fields_by_path(Model())


def init(config, shape=(2, 24, 24, 3), outputs=5, seed=0):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return StridedNet(config, outputs).lazy_init(jax.random.key(seed), x, train=False)


def kernels(variables):
    flat = flatten_dict(variables['params'], sep='/')
    return {path: leaf for path, leaf in flat.items() if path.endswith('kernel')}


def kernel_shapes(config, shape, outputs=10):
    shapes = jax.eval_shape(functools.partial(init, config, shape, outputs))
    return {path: kernel.shape for path, kernel in kernels(shapes).items()}


def keras_net(outputs):
    """The strided net in Keras's own layers, named as ours with - for /."""
    layers, penalty = keras.layers, keras.regularizers.L2(5e-4)
    conv = functools.partial(layers.Conv2D, kernel_initializer='zeros', kernel_regularizer=penalty)
    dense = functools.partial(layers.Dense, kernel_initializer='zeros')
    norm = layers.BatchNormalization

    net = [keras.Input((32, 32, 3)), conv(16, 7, 2, 'valid', name='stem_conv')]
    for i, width in enumerate((32, 64, 128), start=1):
        net += [conv(width, 3, 1, 'same', name=f'block{i}_conv1'), layers.ReLU()]
        net += [norm(name=f'block{i}_norm1')]
        net += [conv(width, 3, 2, 'same', name=f'block{i}_conv2'), layers.ReLU()]
        net += [norm(name=f'block{i}_norm2')]
    net += [layers.Flatten(), dense(512, name='head-dense1'), layers.ReLU()]
    net += [norm(name='head-norm1'), dense(outputs, name='head-logits')]
    return keras.Sequential(net, name='net')


def he_normal(shapes, rng):
    """Parameters drawn in NumPy: He-normal kernels, and scales and biases off their start."""

    def draw(shape):
        spread = (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) > 1 else 0.1
        return (rng.normal(size=shape) * spread + (len(shape) == 1)).astype(np.float32)

    return {path: draw(leaf.shape) for path, leaf in shapes.items()}


def copy_to_keras(params, net):
    theirs = {'scale': 'gamma', 'bias': 'beta'}
    variables = {variable.path: variable for variable in net.trainable_variables}
    assert len(variables) == len(params)
    for path, value in params.items():
        *layer, name = path.split('/')
        name = theirs[name] if 'norm' in path else name
        variables[f'net/{"-".join(layer)}/{name}'].assign(value)


def sgd_step(net, x, y):
    """One step of SGD 0.01 on cross-entropy + 5e-4·Σw² over the convolutions' kernels."""

    @jax.jit
    def step(params, stats):
        def loss(params):
            variables = {'params': unflatten_dict(params, sep='/'), 'batch_stats': stats}
            rngs = {'dropout': jax.random.key(0)}
            logits, updated = net.apply(variables, x, train=True, rngs=rngs, mutable='batch_stats')
            task = -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].mean()
            squares = [
                jnp.sum(w**2) for path, w in params.items() if 'conv' in path and w.ndim == 4
            ]
            assert len(squares) == 7
            return task + 5e-4 * sum(squares), updated['batch_stats']

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), stats

    return step


def test_follows_the_loss_of_keras_for_20_sgd_steps():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
    y = rng.integers(0, 10, 8)
    config = dataclasses.replace(Model(), dropout=0.0, head_dropout=0.0)
    shapes = jax.eval_shape(functools.partial(init, config, x.shape, 10))
    params = he_normal(flatten_dict(shapes['params'], sep='/'), rng)
    theirs = keras_net(10)
    copy_to_keras(params, theirs)
    theirs.compile(
        keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    net = StridedNet(config, 10)
    step = sgd_step(net, x, y)
    start = {'mean': jnp.zeros, 'var': jnp.ones}
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: start[path[-1].key](leaf.shape), shapes['batch_stats']
    )

    ours_losses, their_losses = [], []
    for _ in range(20):
        value, params, stats = step(params, stats)
        ours_losses.append(float(value))
        theirs.reset_metrics()
        their_losses.append(float(theirs.train_on_batch(x, y)))
    np.testing.assert_allclose(ours_losses, their_losses, rtol=1e-4)
    assert ours_losses[-1] < ours_losses[0] / 2
    variables = {'params': unflatten_dict(params, sep='/'), 'batch_stats': stats}
    logits = net.apply(variables, x, train=False)
    np.testing.assert_allclose(logits, theirs(x, training=False), rtol=1e-2, atol=1e-3)


def test_the_strided_net_has_these_layers():
    assert kernel_shapes(Model(), (1, 96, 96, 3)) == {
        'stem_conv/kernel': (7, 7, 3, 16),
        'block1_conv1/kernel': (3, 3, 16, 32),
        'block1_conv2/kernel': (3, 3, 32, 32),
        'block2_conv1/kernel': (3, 3, 32, 64),
        'block2_conv2/kernel': (3, 3, 64, 64),
        'block3_conv1/kernel': (3, 3, 64, 128),
        'block3_conv2/kernel': (3, 3, 128, 128),
        'head/dense1/kernel': (6 * 6 * 128, 512),
        'head/logits/kernel': (512, 10),
    }


def test_the_small_net_has_these_layers():
    assert kernel_shapes(SMALL, (1, 28, 28, 1)) == {
        'block1_conv1/kernel': (3, 3, 1, 32),
        'block1_conv2/kernel': (3, 3, 32, 32),
        'block2_conv1/kernel': (3, 3, 32, 64),
        'block2_conv2/kernel': (3, 3, 64, 64),
        'head/dense1/kernel': (7 * 7 * 64, 128),
        'head/logits/kernel': (128, 10),
    }


@pytest.mark.parametrize(
    'change',
    [
        *({'norm': norm, 'norm_groups': 2} for norm in FIELDS['norm'].metadata['choices']),
        {'head_norm': 'none'},
        {'head_norm': 'layer'},
        {'norm_position': 'before'},
        {'dropout': 0.0, 'head_dropout': 1.0},
        *({'drop_kind': kind} for kind in FIELDS['drop_kind'].metadata['choices']),
        {'input_noise': 1.0},
        {'weight_standardization': True},
        {'downsample': 'max_pool'},
        {'downsample': 'avg_pool'},
        {'padding': 'SAME_TORCH'},
        {'padding': 'CIRCULAR'},
        {'activation': 'gelu'},
        {'dtype': 'bfloat16'},
    ],
    ids=str,
)
def test_arms_share_every_initial_kernel_bit_for_bit(change):
    changed = kernels(init(dataclasses.replace(TINY, **change)))
    jax.tree.map(np.testing.assert_array_equal, changed, kernels(init(TINY)))


def test_initial_kernels_depend_on_the_seed():
    ours, others = kernels(init(TINY)), kernels(init(TINY, seed=1))
    assert not any((ours[path] == others[path]).any() for path in ours)


@pytest.mark.parametrize('downsample', ['max_pool', 'avg_pool'])
@pytest.mark.parametrize('padding', ['SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT'])
@pytest.mark.parametrize(('kernel', 'stride', 'side'), [(3, 2, 27), (2, 3, 30)])
def test_pooling_gives_the_size_that_the_stride_gives(downsample, padding, kernel, stride, side):
    config = Model(
        stem_width=0, widths=(2,), hidden=(), kernel=kernel, stride=stride, padding=padding
    )
    height, width = feature_map_size(config, (side, side + 1))
    for choice in ('stride', downsample):
        config = dataclasses.replace(config, downsample=choice)
        shapes = kernel_shapes(config, (1, side, side + 1, 1))
        assert shapes['head/logits/kernel'] == (height * width * 2, 10)


@pytest.mark.parametrize(
    ('change', 'differs'),
    [
        ({}, False),
        ({'padding': 'REFLECT'}, True),
        ({'downsample': 'max_pool'}, True),
        ({'downsample': 'avg_pool'}, True),
        ({'norm_position': 'before'}, True),
        ({'activation': 'tanh'}, True),
        ({'norm_epsilon': 1.0}, True),
        ({'dropout': 0.9}, True),
        ({'head_dropout': 0.9}, True),
        ({'drop_kind': 'channel'}, True),
        ({'drop_kind': 'block', 'drop_block': 2}, True),
        ({'drop_kind': 'gaussian'}, True),
        ({'drop_block': 2}, False),
        ({'input_noise': 0.1}, True),
        ({'weight_standardization': True}, True),
        ({'norm': 'ghost', 'ghost_batch': 1}, True),
        ({'norm': 'ghost', 'ghost_batch': 2}, False),
        ({'norm': 'group', 'norm_groups': 2}, True),
        ({'norm': 'layer'}, True),
        ({'norm': 'instance'}, True),
        ({'head_norm': 'layer'}, True),
    ],
    ids=str,
)
def test_every_field_changes_the_training_output(change, differs):
    variables = init(TINY)
    x = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))

    def outputs(config):
        call = {'train': True, 'mutable': ['batch_stats'], 'rngs': {'dropout': jax.random.key(2)}}
        return StridedNet(config, 5).apply(variables, x, **call)[0]

    changed = outputs(dataclasses.replace(TINY, **change))
    assert bool((changed != outputs(TINY)).any()) == differs


@pytest.mark.parametrize('norm', ['batch', 'ghost', 'renorm'])
def test_an_interceptor_can_put_one_layer_in_inference_mode(norm):
    """Every layer is called with the keyword `train`, and named by its path."""
    config = dataclasses.replace(TINY, norm=norm, ghost_batch=1)
    variables = init(config)
    x = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))

    def freeze(call, args, kwargs, context):
        if context.module.path == ('block1_norm1',):
            kwargs = kwargs | {'train': False}
        return call(*args, **kwargs)

    with nn.intercept_methods(freeze):
        rngs = {'dropout': jax.random.key(0)}
        _, updated = StridedNet(config, 5).apply(
            variables, x, train=True, mutable='batch_stats', rngs=rngs
        )
    before, after = variables['batch_stats'], updated['batch_stats']
    after, before = flatten_dict(after, sep='/'), flatten_dict(before, sep='/')
    still = [path for path in before if (after[path] == before[path]).all()]
    leaves = ['mean', 'share', 'var'] if norm == 'renorm' else ['mean', 'var']
    assert sorted(still) == [f'block1_norm1/{leaf}' for leaf in leaves]


def test_bfloat16_gives_float32_logits_with_float32_parameters():
    config = dataclasses.replace(TINY, dtype='bfloat16', dropout=0.0, head_dropout=0.0)
    net, variables = StridedNet(config, 5), init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype('float32')}
    x = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    half = net.apply(variables, x, train=False)
    assert half.dtype == jnp.float32
    exact = StridedNet(TINY, 5).apply(variables, x, train=False)
    np.testing.assert_allclose(half, exact, atol=0.1 * float(abs(exact).max()))


@pytest.mark.parametrize(
    ('config', 'side'),
    [
        (Model(), 7),
        (SMALL, 1),
        (dataclasses.replace(Model(), padding='VALID'), 63),
        (dataclasses.replace(SMALL, padding='VALID'), 13),
        (dataclasses.replace(SMALL, padding='REFLECT'), 3),
    ],
)
def test_minimum_size(config, side):
    assert minimum_size(config) == side
    feature_map_size(config, (side, side))
    if side > 1:
        with pytest.raises(UserError):
            feature_map_size(config, (side - 1, side - 1))


def test_too_small_an_image_names_the_layer_its_input_and_the_minimum():
    config = dataclasses.replace(Model(), padding='VALID')
    message = r'^block3_conv1: .*3×3.* input of 1×1.*at least 63×63 pixels.*32×32'
    with pytest.raises(UserError, match=message):
        init(config, (1, 32, 32, 3))
