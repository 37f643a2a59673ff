"""Two-dimensional convolution, NHWC images and HWIO kernels."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.padding import Padding, Size, output_shape, pair, resolve_padding

FEW = 27  # numbers in a window: 3×3 taps of a colour image
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
        pads = ((0, 0), (0, 0))
    if groups == 1 and jax.default_backend() == 'cpu':
        window = (pair(stride), tuple(pads), pair(dilation))
        # Eigen, behind XLA on a CPU, is 5 to 100 times slower where the kernel outgrows the image,
        if any(k > n for k, n in zip(kernel.shape, x.shape[1:3])):
            return _by_matmul(x, kernel, *window)
        # and 2 to 13 times slower than a fused sum where a window holds few numbers.
        if math.prod(kernel.shape[:3]) <= FEW and x.dtype == jnp.float32:
            return _by_sum(x, kernel, *window)
    return _by_xla(x, kernel, pair(stride), pads, pair(dilation), groups)


def _by_xla(x, kernel, stride, pads, dilation, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=stride,
        padding=pads,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def _by_matmul(x, kernel, stride, pads, dilation):
    """The same convolution as one product: the windows as rows, the kernel as a matrix."""
    windows = jnp.concatenate(list(_shifted(x, kernel.shape, stride, pads, dilation)), axis=-1)
    return windows @ kernel.reshape(-1, kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_sum(x, kernel, stride, pads, dilation):
    """The same convolution as a sum over the window's numbers, which XLA fuses into one loop."""
    taps = kernel.reshape(-1, *kernel.shape[2:])
    terms = [
        image[..., c : c + 1] * tap[c]
        for image, tap in zip(_shifted(x, kernel.shape, stride, pads, dilation), taps)
        for c in range(x.shape[-1])
    ]
    return sum(terms[1:], start=terms[0])


def _by_sum_forward(x, kernel, *window):
    return _by_sum(x, kernel, *window), (x, kernel)


def _by_sum_backward(stride, pads, dilation, inputs, gradient):
    # The sum's own gradients are slower than Eigen's convolutions.
    _, pull_back = jax.vjp(lambda x, k: _by_xla(x, k, stride, pads, dilation), *inputs)
    return pull_back(gradient)


_by_sum.defvjp(_by_sum_forward, _by_sum_backward)


def _shifted(x, kernel_shape, stride, pads, dilation):
    """What each tap of the kernel sees: the padded images, moved and strided."""
    # lax.pad, since explicit padding may be negative.
    x = lax.pad(x, jnp.zeros((), x.dtype), [(lo, hi, 0) for lo, hi in ((0, 0), *pads, (0, 0))])
    taps = kernel_shape[:2]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, taps)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, stride))
    for p, q in itertools.product(*map(range, taps)):
        top, left = p * dilation[0], q * dilation[1]
        bottom = top + stride[0] * (height - 1) + 1
        right = left + stride[1] * (width - 1) + 1
        yield x[:, top : bottom : stride[0], left : right : stride[1]]


class Conv(nn.Module):
    """Convolution layer, y = `conv2d`(x, kernel) + bias.

    Attributes:
        features: Channels of the output, f.
        kernel_size, strides, padding, dilation, groups: As in `conv2d`.
        use_bias: Whether to add a bias.
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
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)
