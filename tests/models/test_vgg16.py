"""VGG16's layers, shapes and names; `pretrained.test_oracles` has its outputs."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cnn_jax.backbones import VGG16
from cnn_jax.errors import UserError
from cnn_jax.pretrained.networks import shapes


def abstract(model: VGG16, *shape: int):
    """Output and parameters as shapes, without computing them."""
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), image)


def test_parameters_are_the_published_ones():
    _, variables = abstract(VGG16(), 1, 224, 224, 3)
    assert list(variables) == ['params']
    ours = {name: leaf.shape for name, leaf in flatten_dict(variables['params'], sep='/').items()}
    assert ours == shapes()


def test_layers_are_those_of_keras():
    theirs = keras.applications.VGG16(weights=None, include_top=False)
    names = [layer.name for layer in theirs.layers[1:]]
    assert list(VGG16.LAYERS) == names


@pytest.mark.parametrize(
    ('cut', 'shape'),
    [
        ('block1_conv2', (2, 50, 33, 64)),
        ('block1_pool', (2, 25, 16, 64)),
        ('block3_conv3', (2, 12, 8, 256)),
        ('block5_conv1', (2, 3, 2, 512)),
        ('block5_pool', (2, 1, 1, 512)),
        (None, (2, 1, 1, 512)),
    ],
)
def test_cut(cut, shape):
    output, variables = abstract(VGG16(cut=cut), 2, 50, 33, 3)
    assert output.shape == shape
    reached = VGG16.LAYERS[: VGG16.LAYERS.index(cut or 'block5_pool') + 1]
    assert list(variables['params']) == [x for x in reached if 'conv' in x]


def test_cut_at_a_layer_continues_into_the_next():
    """block2_pool of the whole is the 2×2 maximum of block2_conv2 of the cut net."""
    x = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    params = VGG16(cut='block2_pool').init(jax.random.key(0), x)
    convolved = VGG16(cut='block2_conv2').apply(params, x)
    pooled = VGG16(cut='block2_pool').apply(params, x)
    assert convolved.min() == 0  # ReLU belongs to the layer
    by_hand = np.asarray(convolved).reshape(1, 8, 2, 8, 2, 128).max((2, 4))
    np.testing.assert_array_equal(pooled, by_hand)


def test_bfloat16_has_float32_parameters_and_training_is_inference():
    x = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    half = VGG16(cut='block2_conv1', dtype=jnp.bfloat16)
    params = half.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    features = half.apply(params, x)
    assert features.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.apply(params, x, train=True), features)
    whole = VGG16(cut='block2_conv1').apply(params, x)
    error = jnp.linalg.norm(features.astype(jnp.float32) - whole) / jnp.linalg.norm(whole)
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize(
    ('options', 'shape', 'sentence'),
    [
        ({}, (1, 31, 40, 3), 'at least 32×32 pixels, not 31×40'),
        ({'cut': 'block1_conv1'}, (1, 40, 31, 3), 'at least 32×32 pixels, not 40×31'),
        ({}, (1, 64, 64, 1), r'three channels .* not \[1, 64, 64, 1\]'),
        ({}, (64, 64, 3), r'not \[64, 64, 3\]'),
        ({'cut': 'fc1'}, (1, 224, 224, 3), "cannot be cut at 'fc1'"),
        ({'cut': 'block6_pool'}, (1, 64, 64, 3), 'block5_conv3, block5_pool'),
    ],
)
def test_what_it_does_not_take(options, shape, sentence):
    with pytest.raises(UserError, match=sentence):
        abstract(VGG16(**options), *shape)
