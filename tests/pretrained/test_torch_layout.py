"""torchvision's and timm's names and axes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax.pretrained.layout import shapes
from cnn_jax.pretrained.stored import Stored
from cnn_jax.pretrained.torch_layout import canonical, canonical_name, dense_kernel

TORCHVISION = ('classifier.0', 'classifier.3', 'classifier.6')
TIMM = ('pre_logits.fc1', 'pre_logits.fc2', 'head.fc')


@pytest.mark.parametrize('top', [TORCHVISION, TIMM], ids=['torchvision', 'timm'])
def test_every_parameter_has_one_name(top):
    layers = [f'features.{i}' for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    names = [f'{layer}.{tensor}' for layer in (*layers, *top) for tensor in ('weight', 'bias')]
    assert [canonical_name(name) for name in names] == list(shapes(include_top=True))


@pytest.mark.parametrize('name', ['features.1.weight', 'features.0.running_mean', 'fc1', ''])
def test_other_names_stay(name):
    assert canonical_name(name) == name


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_dense_kernel_sees_the_same_pixels(channels, height, width, outputs):
    """W · flatten(CHW image) = flatten(HWC image) · K."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-9, 9, (outputs, channels * height * width))
    image = rng.integers(-9, 9, (height, width, channels))
    theirs = weight @ image.transpose(2, 0, 1).ravel()
    for shape in (weight.shape, (outputs, channels, height, width)):
        kernel = dense_kernel(weight.reshape(shape), height * width)
        np.testing.assert_array_equal(image.ravel() @ kernel, theirs)


def test_convolution_kernels_become_hwio():
    weight = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    ours = canonical('block1_conv1/kernel', Stored(weight.shape, 'int64', lambda: weight))
    assert ours.shape == ours.read().shape == (5, 7, 3, 2)
    assert ours.read()[4, 6, 2, 1] == weight[1, 2, 4, 6]


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('fc1/kernel', (4096, 512, 7, 7)),
        ('fc1/kernel', (4096, 25088)),
        ('fc2/kernel', (4096, 4096, 1, 1)),
        ('predictions/kernel', (1000, 4096)),
        ('predictions/bias', (1000,)),
    ],
)
def test_shapes_of_the_top(name, shape):
    stored = canonical(
        name, Stored(shape, 'float32', lambda: np.broadcast_to(np.float32(0), shape))
    )
    assert stored.shape == shapes(include_top=True)[name]
