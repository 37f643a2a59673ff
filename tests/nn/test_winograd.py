import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.nn import winograd
from cnn_jax.nn.conv import Conv, conv2d
from cnn_jax.nn.winograd import (
    transform_kernel,
    transform_kernels,
    winograd_conv2d,
    winograd_interceptor,
)


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 4),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    tiles=st.sampled_from([1, 4, 9, 900]),
)
def test_it_is_the_convolution_in_blocks_of_any_size(batch, height, width, tiles):
    x, kernel = draw((batch, height, width, 5), (3, 3, 5, 7))
    with jax.enable_x64(True):
        before, winograd.TILES = winograd.TILES, tiles
        try:
            y = winograd_conv2d(x, transform_kernel(jnp.array(kernel)))
        finally:
            winograd.TILES = before
        expected = conv2d(x, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


def test_the_error_of_float32_is_below_1e_5_of_the_norm():
    x, kernel = draw((2, 28, 28, 64), (3, 3, 64, 64))
    with jax.enable_x64(True):
        exact = np.asarray(conv2d(x, kernel))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    y = winograd_conv2d(x, transform_kernel(jnp.array(kernel)))
    assert y.dtype == np.float32
    assert np.linalg.norm(y - exact) < 1e-5 * np.linalg.norm(exact)


def test_layers_with_transformed_kernels_use_them_and_others_do_not():
    x, kernel, bias = map(jnp.float32, draw((2, 9, 10, 8), (3, 3, 8, 4), (4,)))
    params = {'kernel': kernel, 'bias': bias}
    fast = transform_kernels(params)
    assert fast['kernel'].shape == (36, 8, 4)
    expected = Conv(4).apply({'params': params}, x)
    with nn.intercept_methods(winograd_interceptor):
        for given in (params, fast):
            y = Conv(4).apply({'params': given}, x)
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_kernels_of_colour_images_and_of_other_sizes_stay():
    params = {'a': jnp.ones((3, 3, 3, 4)), 'b': jnp.ones((5, 5, 8, 4)), 'c': jnp.ones(4)}
    assert all(transform_kernels(params)[path] is leaf for path, leaf in params.items())
