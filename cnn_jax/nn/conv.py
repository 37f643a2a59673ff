"""Two-dimensional convolution, NHWC images and HWIO kernels."""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.channels import add_bias
from cnn_jax.nn.conv_cpu import convolve
from cnn_jax.nn.padding import Padding, Size, output_shape, pair, resolve_padding
from cnn_jax.nn.platform import on_cpu
from cnn_jax.nn.weight_standardization import standardized

_PAD_MODE = {'CIRCULAR': 'wrap', 'REFLECT': 'reflect'}


def conv2d(
    x: Float[Array, 'b h w c'],
    kernel: Float[Array, 'kh kw c/g f'],
    *,
    stride: Size = 1,
    padding: Padding = 'SAME',
    dilation: Size = 1,
    groups: int = 1,
) -> Float[Array, 'b h2 w2 f']:
    """Convolution, which as everywhere in deep learning is a cross-correlation.

    y[b,i,j,f] = Σ_{p,q,c} x̃[b, i·s + p·d, j·s + q·d, c] · kernel[p,q,c,f], x̃ the padded x.

    Args:
        x: Images; any float type, the kernel's.
        kernel: Taps; with groups g, output f sees the c/g channels of its group alone.
        stride: Pixels between neighbouring windows.
        padding: See `cnn_jax.nn.padding.resolve_padding`; zeros, but for CIRCULAR (the opposite
            edge) and REFLECT (mirrored about the edge pixel).
        dilation: Pixels between neighbouring taps.
        groups: Parts into which the channels are split; divides c and f.

    Returns:
        Of the size that `cnn_jax.nn.padding.output_shape` says.

    Errors:
        UserError: The kernel does not fit the padded input.
    """
    pads = resolve_padding(padding, x.shape[1:3], kernel.shape[:2], stride, dilation)
    if isinstance(padding, str) and padding in _PAD_MODE:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode=_PAD_MODE[padding])
        pads = (0, 0), (0, 0)
    strides, dilations = pair(stride), pair(dilation)
    if groups == 1 and on_cpu():
        return convolve(x, kernel, strides, pads, dilations)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=pads,
        rhs_dilation=dilations,
        feature_group_count=groups,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


class Conv(nn.Module):
    """Convolution layer, y = `conv2d`(x, kernel) + bias.

    Attributes:
        features: Channels of the output, f.
        kernel_size, strides, padding, dilation, groups: As in `conv2d`.
        use_bias: Whether to add a bias.
        standardize: Whether the kernel is standardized filter by filter before it is used; see
            `cnn_jax.nn.weight_standardization`.
        dtype: Type of the computation and the result; None infers it from x and the parameters.
        kernel_init: He-normal as Keras has it: a normal truncated at two deviations, variance
            2 / (kh·kw·c/g).

    Parameters are float32: kernel [kh, kw, c/g, f] and bias [f].

    Source: He et al. 2015, "Delving Deep into Rectifiers", for the initialization.
    """

    features: int
    kernel_size: Size = 3
    strides: Size = 1
    padding: Padding = 'SAME'
    dilation: Size = 1
    groups: int = 1
    use_bias: bool = True
    standardize: bool = False
    dtype: Dtype | None = None
    kernel_init: Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 f']:
        layer = '/'.join(self.path) or 'Conv'
        if x.shape[-1] % self.groups or self.features % self.groups:
            raise UserError(
                f'{layer}: {self.groups} groups must divide both the {x.shape[-1]} channels of '
                f'its input and its {self.features} features'
            )
        # conv2d would refuse the same window, without knowing the layer's name.
        output_shape(
            x.shape[1:3], self.kernel_size, self.strides, self.dilation, self.padding, layer=layer
        )
        shape = (*pair(self.kernel_size), x.shape[-1] // self.groups, self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        if self.standardize:
            kernel = standardized(kernel)
        bias = None
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv2d(
            x,
            kernel,
            stride=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y if bias is None else add_bias(y, bias)
