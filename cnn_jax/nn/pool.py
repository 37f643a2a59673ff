"""Pooling: windows summarized by their maximum or their mean."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.nn.padding import Size, pair


def max_pool(
    x: Float[Array, 'b h w c'],
    window: Size,
    stride: Size | None = None,
    padding: str = 'VALID',
) -> Float[Array, 'b h2 w2 c']:
    """The largest value of each window.

    Args:
        x: images.
        window: Height and width of a window, in pixels; a single number means a square.
        stride: Pixels between neighbouring windows; None: the window's own size.
        padding: VALID, which ignores what does not fill a window, or SAME, TensorFlow's rule.

    Returns:
        Of the size that `cnn_jax.nn.padding.output_shape` says.
    """
    return nn.max_pool(x, pair(window), pair(stride or window), padding)


def avg_pool(
    x: Float[Array, 'b h w c'],
    window: Size,
    stride: Size | None = None,
    padding: str = 'VALID',
) -> Float[Array, 'b h2 w2 c']:
    """The mean of each window, over those of its pixels that lie in the image.

    Arguments and result as `max_pool`. (PyTorch counts the padding too, Keras does not.)
    """
    return nn.avg_pool(x, pair(window), pair(stride or window), padding, count_include_pad=False)


def global_average(x: Float[Array, 'b h w c']) -> Float[Array, 'b c']:
    """The mean of each channel over the image, added up in float32 and returned in x's type."""
    return jnp.mean(x, axis=(1, 2))
