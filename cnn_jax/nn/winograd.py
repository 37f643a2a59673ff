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
from cnn_jax.nn.padding import output_shape, pair, resolve_padding
from cnn_jax.params import Flat

BLOCK = 16  # the library transforms kernels whose channels and filters it divides


def transform_kernels(params: Flat) -> Flat:
    """Parameters with transformed 3×3 kernels, for `winograd_interceptor`, where that is faster.

    On a CPU with the native library, in float32. All convolutions that have a bias, which alone
    the interceptor takes, must be of stride 1, undilated, ungrouped and SAME.
    """
    if not (on_cpu() and native.available()):
        return params
    biased = {path.removesuffix('bias') + 'kernel' for path in params if path.endswith('/bias')}
    return {
        path: _transformed(leaf) if path in biased and _fits(leaf) else leaf
        for path, leaf in params.items()
    }


def _fits(leaf: jax.Array) -> bool:
    *size, channels, filters = leaf.shape if leaf.ndim == 4 else (0, 0, 0)
    return size == [3, 3] and channels % BLOCK == 0 and filters % BLOCK == 0


def _transformed(kernel: Float[Array, '3 3 c f']) -> Float[Array, '36 c f']:
    # G k Gᵀ of each pair of channels (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural
    # Networks"), in the library's order.
    return native.call('transform', (36, *kernel.shape[2:]), kernel)


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
    relu = layer.activation is nn.relu
    y = _frozen(layer, x, kernel, layer.get_variable('params', 'bias'), relu)
    return y if relu or layer.activation is None else layer.activation(y)


def _frozen(layer: Conv, x: Array, kernel: Array, bias: Array, relu: bool) -> Array:
    """The layer's convolution plus the bias, then ReLU; not differentiable.

    The rounding error of a transformed kernel is 1e-6 to 4e-6 of the result's norm, three to five
    times the direct sum's.
    """
    size, stride, dilation = layer.kernel_size, layer.strides, layer.kernel_dilation
    pads = resolve_padding(layer.padding, x.shape[1:3], size, stride, dilation)
    shape = output_shape(x.shape[1:3], size, stride, dilation, layer.padding)
    window = np.array([*pair(stride), pads[0][0], pads[1][0], *pair(dilation), 1], np.int64)
    out = (len(x), *shape, kernel.shape[-1])
    return native.call('conv_frozen', out, x, kernel, bias, window=window, relu=relu)
