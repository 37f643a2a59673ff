"""Convolutions of frozen layers on a CPU, by the native library.

Kernels that are fixed are transformed once for Winograd's form F(4×4, 3×3), and bias and ReLU are
applied to a result before it is stored, in place of two more passes over memory.
"""

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from cnn_jax.nn import native
from cnn_jax.nn.conv import Conv
from cnn_jax.nn.cpu import on_cpu
from cnn_jax.nn.padding import Padding, Size, output_shape, pair, resolve_padding
from cnn_jax.params import Flat

BLOCK = 16  # the library transforms kernels whose channels and filters it divides


def transform_kernels(params: Flat) -> Flat:
    """Parameters with transformed 3×3 kernels, for `winograd_interceptor`, where that is faster.

    On a CPU with the native library, in float32. All convolutions must be of stride 1, undilated,
    ungrouped and SAME.
    """
    if not (on_cpu() and native.available()):
        return params
    return {path: transform_kernel(leaf) if _fits(leaf) else leaf for path, leaf in params.items()}


def winograd_interceptor(call, args, kwargs, context):
    """A Flax interceptor: convolutions in float32 are computed as frozen ones."""
    layer = context.module
    if not isinstance(layer, Conv) or context.method_name != '__call__':
        return call(*args, **kwargs)
    (x,) = args
    kernel = layer.get_variable('params', 'kernel')
    plain = layer.feature_group_count == 1 and layer.use_bias and not layer.standardize
    floats = x.dtype == kernel.dtype == np.float32 and layer.dtype in (None, np.float32, 'float32')
    zeros = layer.padding not in ('CIRCULAR', 'REFLECT')
    if not (on_cpu() and native.available() and plain and floats and zeros):
        return call(*args, **kwargs)
    window = layer.kernel_size, layer.strides, layer.kernel_dilation
    relu = layer.activation is nn.relu
    y = frozen_conv2d(x, kernel, layer.get_variable('params', 'bias'), *window, layer.padding, relu)
    return y if relu or layer.activation is None else layer.activation(y)


def transform_kernel(kernel: Float[Array, '3 3 c f']) -> Float[Array, '36 c f']:
    """G k Gᵀ of each pair of channels, in the library's order; to be computed once.

    Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks".
    """
    return native.call('transform', (36, *kernel.shape[2:]), kernel)


def frozen_conv2d(
    x: Float[Array, 'b h w c'],
    kernel: Float[Array, '*k c f'],
    bias: Float[Array, ' f'],
    size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    padding: Padding = 'SAME',
    relu: bool = False,
) -> Float[Array, 'b h2 w2 f']:
    """`nn.conv.conv2d` plus a bias, then ReLU; not differentiable.

    The rounding error of a transformed kernel is 1e-6 to 4e-6 of the result's norm, three to five
    times the direct sum's.

    Args:
        x: Images, float32.
        kernel: The kernel, or what `transform_kernel` makes of it.
        bias: A number for each filter.
        size: Height and width of the kernel.
        stride, dilation, padding: As those of `conv2d`, with zeros for padding.
        relu: Whether negative numbers become 0.
    """
    pads = resolve_padding(padding, x.shape[1:3], size, stride, dilation)
    shape = x.shape[0], *output_shape(x.shape[1:3], size, stride, dilation, padding)
    window = np.array([*pair(stride), pads[0][0], pads[1][0], *pair(dilation), 1], np.int64)
    out = (*shape, kernel.shape[-1])
    return native.call('conv_frozen', out, x, kernel, bias, window=window, relu=relu)


def _fits(leaf: jax.Array) -> bool:
    *size, channels, filters = leaf.shape if leaf.ndim == 4 else (0, 0, 0)
    return size == [3, 3] and channels % BLOCK == 0 and filters % BLOCK == 0
