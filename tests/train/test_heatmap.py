"""Grad-CAM against networks for which it is known in closed form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.train.heatmap import default_layer, draw_heatmap, grad_cam


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


def test_with_average_pooling_it_is_the_class_activation_map(net):
    model, variables, images = net
    classes = jnp.array([0, 1, 0, 1, 1, 0])
    heat = grad_cam(model, variables, images, classes, 'features')
    # Zhou et al. 2016: the map is the features weighted by the class's row of the Dense layer.
    _, seen = model.apply(
        variables, images, train=False, capture_intermediates=True, mutable=['intermediates']
    )
    (features,) = seen['intermediates']['features']['__call__']
    kernel = np.asarray(variables['params']['logits']['kernel'], np.float64)
    kernel = np.hstack([-kernel, kernel]) if kernel.shape[1] == 1 else kernel
    for image in range(len(images)):
        cam = np.maximum(np.asarray(features[image], np.float64) @ kernel[:, classes[image]], 0)
        expected = cam / cam.max() if cam.max() > 0 else cam
        np.testing.assert_allclose(heat[image], expected, rtol=1e-4, atol=1e-5)


def test_without_evidence_the_map_is_zero_and_not_nan(net):
    model, variables, images = net
    variables = jax.tree.map(jnp.zeros_like, variables)
    assert not np.any(grad_cam(model, variables, images, jnp.zeros(6, int), 'features'))


def test_the_layer_is_the_last_that_is_still_an_image(net, small, run):
    model, _, images = net
    assert default_layer(model, images) == 'features'


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / 'new' / 'map.png'
    draw_heatmap(np.zeros((8, 8, 1), np.uint8), np.eye(8), 'title <b>', path)
    assert path.read_bytes().startswith(b'\x89PNG')
