"""Every tensor used, every mismatch listed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.models import VGG16
from cnn_jax.params import flatten
from cnn_jax.pretrained.insert import insert

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def shapes(**options) -> dict:
    return jax.eval_shape(VGG16(**options).init, jax.random.key(0), IMAGE)['params']


def test_whole_backbone(imagenet):
    params = insert(shapes(), imagenet)
    given = flatten(imagenet.params)
    assert flatten(params).keys() == given.keys()
    for name, array in flatten(params).items():
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(array, given[name])


def test_layers_beyond_the_cut_are_left_out(imagenet):
    params = insert(shapes(cut='block3_conv1'), imagenet)
    assert list(params) == [
        'block1_conv1',
        'block1_conv2',
        'block2_conv1',
        'block2_conv2',
        'block3_conv1',
    ]


def test_every_mismatch_is_listed(imagenet):
    model = shapes()
    del model['block2_conv1']
    model['block1_conv1']['kernel'] = jnp.zeros((3, 3, 1, 64))
    model['block4_conv1']['scale'] = jnp.zeros(3)
    with pytest.raises(UserError) as error:
        insert(model, imagenet)
    for problem in (
        'block4_conv1/scale has no pretrained tensor',
        'block2_conv1/kernel is not in the model',
        'block2_conv1/bias is not in the model',
        'block1_conv1/kernel is [3, 3, 1, 64] in the model and [3, 3, 3, 64] in the weights',
    ):
        assert problem in str(error.value)
    assert str(error.value).count(';') == 4


def test_model_with_more_layers_than_the_weights(imagenet):
    shallow = {layer: imagenet.params[layer] for layer in list(imagenet.params)[:4]}
    with pytest.raises(UserError, match='block5_conv3/kernel has no pretrained tensor'):
        insert(shapes(), dataclasses.replace(imagenet, params=shallow))


def test_another_model(imagenet):
    with pytest.raises(UserError, match='stem/kernel has no pretrained tensor'):
        insert({'stem': {'kernel': jnp.zeros(3)}}, imagenet)
    with pytest.raises(UserError, match='has no parameters'):
        insert({}, imagenet)
