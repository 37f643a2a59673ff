"""Grad-CAM against networks for which it is known, and against finite differences."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnn_jax.errors import UserError
from cnn_jax.models import Head, build
from cnn_jax.tools.heatmap import draw_heatmap, grad_cam, image_layers, overlay

SMALL_VGG = {'model__name': 'vgg16', 'model__cut': 'block2_pool', 'model__head_norm': 'none'}


class Flat(nn.Module):
    """No layer's output is an image, and its mode has another name."""

    @nn.compact
    def __call__(self, x, training: bool):
        x = x.reshape(len(x), -1)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class AverageNet(nn.Module):
    """Features, their mean over positions, a Dense layer: there Grad-CAM is CAM."""

    outputs: int

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(5, (3, 3), name='features')(x)
        return nn.Dense(self.outputs, name='logits')(x.mean(axis=(1, 2)))


@pytest.fixture(params=[4, 1], ids=['softmax', 'sigmoid'])
def net(request):
    model = AverageNet(request.param)
    images = jax.random.normal(jax.random.key(0), (6, 8, 10, 3))
    variables = model.init(jax.random.key(1), images, train=False)
    return model, variables, images


def output_of(model, variables, images, layer):
    """What a module returns, by Flax's own recording."""
    _, seen = model.apply(
        variables, images, train=False, capture_intermediates=True, mutable=['intermediates']
    )
    return seen['intermediates'][layer]['__call__'][0]


def scaled(heat):
    heat = np.maximum(heat, 0)
    return heat / heat.max() if heat.max() > 0 else heat


def test_with_average_pooling_it_is_the_class_activation_map(net):
    model, variables, images = net
    classes = jnp.array([0, 1, 0, 1, 1, 0])
    heat = grad_cam(model, variables, images, classes, 'features')
    # Zhou et al. 2016: the map is the features weighted by the class's row of the Dense layer.
    features = np.asarray(output_of(model, variables, images, 'features'), np.float64)
    kernel = np.asarray(variables['params']['logits']['kernel'], np.float64)
    kernel = np.hstack([-kernel, kernel]) if kernel.shape[1] == 1 else kernel
    for image in range(len(images)):
        expected = scaled(features[image] @ kernel[:, classes[image]])
        np.testing.assert_allclose(heat[image], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'side', 'layer'),
    [
        ({}, 24, 'block2_drop'),
        ({'model__norm': 'none'}, 24, 'block2_drop'),
        (SMALL_VGG, 32, 'backbone'),
    ],
    ids=['strided', 'without norm', 'vgg16'],
)
def test_it_is_what_finite_differences_of_the_head_give(small, changes, side, layer):
    config = small(**changes)
    model = build(config.model, 3)
    images = jax.random.normal(jax.random.key(0), (3, side, side, 3))
    classes = np.array([2, 0, 1])
    variables = model.init(jax.random.key(1), images, train=False)
    heat = grad_cam(model, variables, images, classes)

    features = output_of(model, variables, images, layer)
    of_head = {name: tree['head'] for name, tree in variables.items() if 'head' in tree}

    def scores(features):
        logits = Head(config.model, 3).apply(of_head, features, train=False)
        return np.asarray(logits)[range(3), classes].astype(np.float64)

    # Raising a channel everywhere by ε changes the score by ε times the sum of its gradient.
    epsilon = 1e-2
    ups = epsilon * jnp.eye(features.shape[-1])
    slopes = [(scores(features + up) - scores(features - up)) / (2 * epsilon) for up in ups]
    for number in range(3):
        weights = np.array([slope[number] for slope in slopes])
        coarse = scaled(np.asarray(features[number], np.float64) @ weights).astype(np.float32)
        expected = Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)
        assert np.max(coarse) == 1
        np.testing.assert_allclose(heat[number], expected, atol=0.01)


def test_heat_is_float32_between_0_and_1_also_of_a_bfloat16_net(small):
    model = build(small(model__dtype='bfloat16').model, 3)
    images = jax.random.normal(jax.random.key(0), (2, 24, 20, 1))
    variables = model.init(jax.random.key(1), images, train=False)
    heat = grad_cam(model, variables, images, jnp.array([0, 1]))
    assert (heat.dtype, heat.shape) == (jnp.float32, (2, 24, 20))
    assert heat.min() >= 0
    assert 0 < heat.max() <= 1


def test_without_evidence_the_map_is_zero_and_not_nan(net):
    model, variables, images = net
    variables = jax.tree.map(jnp.zeros_like, variables)
    assert not np.any(grad_cam(model, variables, images, jnp.zeros(6, int), 'features'))


def test_the_layer_is_the_last_that_is_still_an_image(net, small):
    model, _, images = net
    assert image_layers(model, images)[-1] == 'features'
    strided = image_layers(build(small().model, 3), jnp.zeros((1, 8, 8, 1)))
    assert strided[-3:] == ['block2_conv2', 'block2_norm2', 'block2_drop']
    vgg = image_layers(build(small(**SMALL_VGG).model, 3), jnp.zeros((1, 32, 32, 3)))
    assert vgg[-2:] == ['backbone/block2_conv2', 'backbone']


def test_a_network_without_images_inside_has_no_heat_map():
    with pytest.raises(UserError, match='no layer whose output is an image'):
        image_layers(Flat(), jnp.zeros((1, 8, 8, 1)))


def test_heat_leaves_the_image_grey_where_there_is_none():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    heat = np.zeros((6, 5))
    heat[2, 3] = 1.0
    mixed = overlay(image, heat)
    grey = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1)
    assert np.ptp(mixed[2, 3].astype(int)) > 50
    mixed[2, 3] = np.round(grey[2, 3])
    np.testing.assert_allclose(mixed, grey, atol=0.5)


@pytest.mark.parametrize(
    ('title', 'channels'), [('a: 4 99.0%', 1), (r'cost $5 \frac$ <b>.jpg: 4', 3), ('花.jpg: 4', 3)]
)
def test_the_picture_is_a_png_whatever_the_file_is_called(tmp_path, channels, title):
    path = tmp_path / 'new' / 'map.png'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        draw_heatmap(np.zeros((8, 8, channels), np.uint8), np.eye(8), title, path)
    with Image.open(path) as picture:
        assert picture.format == 'PNG'
        assert len(np.unique(np.asarray(picture.convert('RGB')).reshape(-1, 3), axis=0)) > 50
    assert [p.name for p in path.parent.iterdir()] == ['map.png']
