"""Winograd's convolution F(4×4, 3×3): a quarter of the multiplications, for kernels that are fixed.

Tiles of 6×6 pixels, of which neighbours share two, give tiles of 4×4:
y = Aᵀ [(G k Gᵀ) ⊙ (Bᵀ x B)] A, summed over channels between the brackets: 36 matrix products.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.nn.conv import Conv, add_bias
from cnn_jax.nn.cpu import materialize, on_cpu
from cnn_jax.params import Flat

# So many tiles at a time that all that is made of them stays in the processor's cache.
TILES = 900

_BT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_G = (
    np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64)
    / 24
)
_AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def transform_kernels(params: Flat) -> Flat:
    """Parameters with transformed 3×3 kernels, for `winograd_interceptor`, where that is faster.

    On a CPU, in float32, and not for colour images, whose three channels leave the products with
    nothing to do. All convolutions must be of stride 1, undilated, ungrouped and SAME.
    """
    if not on_cpu():
        return params
    return {
        path: transform_kernel(leaf) if leaf.shape[:2] == (3, 3) and leaf.shape[2] > 3 else leaf
        for path, leaf in params.items()
    }


def winograd_interceptor(call, args, kwargs, context):
    """A Flax interceptor: layers whose kernels are transformed use them."""
    layer = context.module
    if not isinstance(layer, Conv) or context.method_name != '__call__':
        return call(*args, **kwargs)
    kernel = layer.get_variable('params', 'kernel')
    if kernel.ndim != 3:
        return call(*args, **kwargs)
    (x,) = args
    return add_bias(winograd_conv2d(x, kernel), layer.get_variable('params', 'bias'))


def transform_kernel(kernel: Float[Array, '3 3 c f']) -> Float[Array, '36 c f']:
    """G k Gᵀ of each pair of channels; to be computed once."""
    g = _G.astype(kernel.dtype)
    return jnp.einsum('ai,bj,ijcf->abcf', g, g, kernel).reshape(36, *kernel.shape[2:])


def winograd_conv2d(
    x: Float[Array, 'b h w c'], transformed: Float[Array, '36 c f']
) -> Float[Array, 'b h w f']:
    """`nn.conv.conv2d` with a 3×3 kernel, stride 1 and SAME padding.

    The rounding error of float32 is some 2e-6 of the result's norm, ten times the direct sum's.

    Args:
        x: Images.
        transformed: The kernel as `transform_kernel` gives it.

    Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks".
    """
    batch, height, width, channels = x.shape
    down, across = -(-height // 4), -(-width // 4)
    padded = jnp.pad(x, ((0, 0), (1, 4 * down + 1 - height), (1, 4 * across + 1 - width), (0, 0)))
    # A block is some whole images, or some rows of tiles of one.
    images = _divisor(batch, TILES // (down * across))
    rows = down if images > 1 else _divisor(down, TILES // across)
    bands = down // rows
    shape = (images, 4 * rows + 2, padded.shape[2], channels)

    def block(number):
        image, band = number // bands * images, number % bands * 4 * rows
        return _block(lax.dynamic_slice(padded, (image, band, 0, 0), shape), transformed)

    blocks = lax.map(block, jnp.arange(batch // images * bands))
    return blocks.reshape(batch, 4 * down, 4 * across, -1)[:, :height, :width]


def _block(x, transformed):
    images, height, width, channels = x.shape
    down, across = (height - 2) // 4, (width - 2) // 4
    # Each axis apart: 36 different sums in one loop are slow, and so is computing six of them
    # again for each of the other six.
    x = materialize(_combined(_BT, [x[:, i : i + 4 * down - 3 : 4] for i in range(6)]))
    x = _combined(_BT, [x[:, :, :, j : j + 4 * across - 3 : 4] for j in range(6)], axis=1)
    y = x.reshape(36, -1, channels) @ transformed
    y = y.reshape(6, 6, images, down, across, -1)
    y = materialize(_combined(_AT, list(y)))
    y = _combined(_AT, [y[:, j] for j in range(6)], axis=4)  # [4, images, down, across, 4, f]
    return y.transpose(1, 2, 0, 3, 4, 5).reshape(images, 4 * down, 4 * across, -1)


def _combined(matrix, parts, axis=0):
    """The matrix times the vector of parts, without the products with 0 and 1."""
    results = []
    for row in matrix:
        terms = [part if c == 1 else int(c) * part for c, part in zip(row, parts) if c]
        results.append(sum(terms[1:], start=terms[0]))
    return jnp.stack(results, axis)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`, or 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(most, 1))
