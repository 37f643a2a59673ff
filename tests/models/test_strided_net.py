"""The strided net: its layers, and what each field changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cnn_jax.config import Model
from cnn_jax.errors import UserError
from cnn_jax.models import StridedNet

TINY = Model(stem_width=4, widths=(4, 4), hidden=(8,))
SMALL = Model(stem_width=0, widths=(32, 64), hidden=(128,))


def init(config, shape=(2, 24, 24, 3), outputs=5, seed=0):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return StridedNet(config, outputs).lazy_init(jax.random.key(seed), x, train=False)


def kernels(variables):
    flat = flatten_dict(variables['params'], sep='/')
    return {path: leaf for path, leaf in flat.items() if path.endswith('kernel')}


def kernel_shapes(config, shape, outputs=10):
    shapes = jax.eval_shape(functools.partial(init, config, shape, outputs))
    return {path: kernel.shape for path, kernel in kernels(shapes).items()}


@functools.cache
def trained(**change):
    """The initial kernels of a changed net, and its output in training."""
    config = dataclasses.replace(TINY, **change)
    variables, x = init(config), jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    call = {'train': True, 'mutable': ['batch_stats'], 'rngs': {'dropout': jax.random.key(2)}}
    return kernels(variables), StridedNet(config, 5).apply(variables, x, **call)[0]


STRIDED_KERNELS = {
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
SMALL_KERNELS = {
    'block1_conv1/kernel': (3, 3, 1, 32),
    'block1_conv2/kernel': (3, 3, 32, 32),
    'block2_conv1/kernel': (3, 3, 32, 64),
    'block2_conv2/kernel': (3, 3, 64, 64),
    'head/dense1/kernel': (7 * 7 * 64, 128),
    'head/logits/kernel': (128, 10),
}


@pytest.mark.parametrize(
    ('config', 'shape', 'expected'),
    [(Model(), (1, 96, 96, 3), STRIDED_KERNELS), (SMALL, (1, 28, 28, 1), SMALL_KERNELS)],
)
def test_the_nets_have_these_layers(config, shape, expected):
    assert kernel_shapes(config, shape) == expected


@pytest.mark.parametrize(
    ('change', 'differs'),
    [
        ({}, False),
        ({'padding': 'REFLECT'}, True),
        ({'padding': 'SAME_TORCH'}, False),  # of odd sizes
        ({'padding': 'CIRCULAR'}, True),
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
        *(({'norm': norm}, True) for norm in ('layer', 'instance', 'none')),
        ({'head_norm': 'layer'}, True),
        ({'head_norm': 'none'}, True),
        ({'dtype': 'bfloat16'}, True),
    ],
    ids=str,
)
def test_every_field_changes_the_training_output_and_no_initial_kernel(change, differs):
    (ours, logits), (others, others_logits) = trained(), trained(**change)
    jax.tree.map(np.testing.assert_array_equal, ours, others)
    assert np.allclose(logits, others_logits, rtol=1e-4, atol=1e-5) != differs


@pytest.mark.parametrize('downsample', ['max_pool', 'avg_pool'])
@pytest.mark.parametrize('padding', ['SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT'])
@pytest.mark.parametrize(('kernel', 'stride', 'side'), [(3, 2, 27), (2, 3, 30)])
def test_pooling_gives_the_size_that_the_stride_gives(downsample, padding, kernel, stride, side):
    config = Model(
        stem_width=0, widths=(2,), hidden=(), kernel=kernel, stride=stride, padding=padding
    )
    strided, pooled = (
        kernel_shapes(dataclasses.replace(config, downsample=each), (1, side, side + 1, 1))
        for each in ('stride', downsample)
    )
    assert pooled == strided


def test_bfloat16_gives_float32_logits_with_float32_parameters():
    config = dataclasses.replace(TINY, dtype='bfloat16', dropout=0.0, head_dropout=0.0)
    net, variables = StridedNet(config, 5), init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype('float32')}
    x = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    half = net.apply(variables, x, train=False)
    assert half.dtype == jnp.float32
    exact = StridedNet(TINY, 5).apply(variables, x, train=False)
    np.testing.assert_allclose(half, exact, atol=0.1 * float(abs(exact).max()))


def test_too_small_an_image_names_the_layer_and_its_input():
    config = dataclasses.replace(Model(), padding='VALID')
    message = r'^block3_conv1: .*3×3.* input of 1×1'
    with pytest.raises(UserError, match=message):
        init(config, (1, 32, 32, 3))
