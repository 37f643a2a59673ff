"""Pooling: windows summarized by their maximum or their mean."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.nn.padding import Size, output_shape, pair, resolve_padding


def max_pool(
    x: Float[Array, 'b h w c'],
    window: Size,
    stride: Size | None = None,
    padding: str = 'VALID',
) -> Float[Array, 'b h2 w2 c']:
    """The largest value of each window; the first of equal ones receives the gradient.

    Args:
        x: images.
        window: Height and width of a window, in pixels; a single number means a square.
        stride: Pixels between neighbouring windows; None: the window's own size.
        padding: VALID, which ignores what does not fill a window, or SAME, TensorFlow's rule.

    Returns:
        Of the size that `cnn_jax.nn.padding.output_shape` says.

    Errors:
        UserError: A window is larger than the padded image.
    """
    stride = stride or window
    output_shape(x.shape[1:3], window, stride, 1, padding, layer='max_pool')
    return _max_of_shifts(x, pair(window), pair(stride), padding)


def avg_pool(
    x: Float[Array, 'b h w c'],
    window: Size,
    stride: Size | None = None,
    padding: str = 'VALID',
) -> Float[Array, 'b h2 w2 c']:
    """The mean of each window, over those of its pixels that lie in the image.

    Arguments, result and errors as `max_pool`. (PyTorch counts the padding too, Keras does not.)
    """
    stride = stride or window
    output_shape(x.shape[1:3], window, stride, 1, padding, layer='avg_pool')
    return nn.avg_pool(x, pair(window), pair(stride), padding, count_include_pad=False)


def global_average(x: Float[Array, 'b h w c']) -> Float[Array, 'b c']:
    """The mean of each channel over the image, added up in float32 and returned in x's type."""
    return jnp.mean(x, axis=(1, 2))


def _max_of_shifts(x, window, stride, padding):
    """The maximum of one strided slice for each pixel of the window.

    XLA's own window reduction is three times slower on a CPU, its gradient fifty times (a scatter
    that visits one window after the other), and jaxlib 0.12 computes it wrongly for bfloat16
    (3e38 where 8 is right, after two convolutions).
    """
    size, channels = x.shape[1:3], x.shape[3]
    pads = resolve_padding(padding, size, window, stride)
    height, width = output_shape(size, window, stride, 1, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    end = (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    shifts = [
        lax.slice(x, (0, i, j, 0), (x.shape[0], i + end[0], j + end[1], channels), (1, *stride, 1))
        for i in range(window[0])
        for j in range(window[1])
    ]
    return functools.reduce(lambda a, b: jnp.where((a >= b) | jnp.isnan(a), a, b), shifts)
