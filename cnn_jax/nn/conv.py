"""Two-dimensional convolution and pooling, NHWC images and HWIO kernels."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.cpu import broadcast_channels, compute_type
from cnn_jax.nn.padding import Padding, Size, output_shape, pair, resolve_padding
from cnn_jax.nn.products import Window, convolve

_PAD_MODE = {'CIRCULAR': 'wrap', 'REFLECT': 'reflect'}
_EPSILON = 1e-5  # of weight standardization


def conv2d(
    x: Float[Array, 'b h w c'],
    kernel: Float[Array, 'kh kw c/g f'],
    *,
    stride: Size = 1,
    padding: Padding = 'SAME',
    dilation: Size = 1,
    groups: int = 1,
    winograd: bool = False,
) -> Float[Array, 'b h2 w2 f']:
    """Convolve images; as everywhere in deep learning this is a cross-correlation.

    y[b,i,j,f] = Σ_{p,q,c} x̃[b, i·s + p·d, j·s + q·d, c] · kernel[p,q,c,f], x̃ the padded x.

    Args:
        x: Images; any float type, the kernel's.
        kernel: Taps; with groups g, output f sees the c/g channels of its group alone.
        stride: Pixels between neighbouring windows.
        padding: See `resolve_padding`; zeros, but for CIRCULAR (the opposite edge) and REFLECT
            (mirrored about the edge pixel).
        dilation: Pixels between neighbouring taps.
        groups: Parts into which the channels are split; divides c and f.
        winograd: Whether 3×3 kernels of stride 1 may be computed on tiles of 4×4 pixels (Lavin &
            Gray 2016), up to three times faster. The rounding error is then 1e-6 to 4e-6 of the
            result's norm, three to five times the direct sum's. For float32 on a CPU; ignored
            elsewhere.

    Returns:
        Images of the size that `output_shape` gives.

    Errors:
        UserError: The kernel does not fit the padded input, or the shapes do not fit each other.

    >>> nn.conv2d(jnp.ones((1, 7, 7, 3)), jnp.ones((3, 3, 3, 8)), stride=2, padding='VALID').shape
    (1, 3, 3, 8)
    """
    if (
        x.ndim != 4
        or kernel.ndim != 4
        or x.shape[3] != groups * kernel.shape[2]
        or kernel.shape[3] % groups
    ):
        raise UserError(
            f'a convolution of images {list(x.shape)} with a kernel {list(kernel.shape)} in '
            f'{groups} groups; they must be [n, height, width, channels] and [height, width, '
            'channels/groups, features], features a multiple of the groups'
        )
    pads = resolve_padding(padding, x.shape[1:3], kernel.shape[:2], stride, dilation)
    if isinstance(padding, str) and padding in _PAD_MODE:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode=_PAD_MODE[padding])
        pads = (0, 0), (0, 0)
    sizes = pair(x.shape[1:3]), pair(kernel.shape[:2]), pair(stride)
    return convolve(x, kernel, Window(*sizes, pads, pair(dilation), groups, winograd))


class Conv(nn.Module):
    """Convolution layer, y = σ(`conv2d`(x, kernel) + bias).

    Attributes:
        features: Channels of the output, f.
        kernel_size, strides, padding, kernel_dilation, feature_group_count: As the kernel, stride,
            padding, dilation and groups of `conv2d`; the names are Flax's.
        use_bias: Whether to add a bias.
        activation: σ, or None for none.
        standardize: Whether the kernel is standardized filter by filter before it is used; see
            `standardize_kernel`.
        winograd: As that of `conv2d`.
        dtype: Type of the computation and the result; None infers it from x and the parameters.
        kernel_init: He-normal as Keras has it: a normal truncated at two deviations, variance
            2 / (kh·kw·c/g).

    Parameters are float32: kernel [kh, kw, c/g, f] and bias [f].

    Source: He et al. 2015, "Delving Deep into Rectifiers", for the initialization.

    >>> layer = nn.Conv(16, kernel_size=7, strides=2, padding='VALID')
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 96, 96, 3)))[0].shape
    (1, 45, 45, 16)
    """

    features: int
    kernel_size: Size = 3
    strides: Size = 1
    padding: Padding = 'SAME'
    kernel_dilation: Size = 1
    feature_group_count: int = 1
    use_bias: bool = True
    activation: Callable[[Array], Array] | None = None
    standardize: bool = False
    winograd: bool = False
    dtype: Dtype | None = None
    kernel_init: Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 f']:
        layer, groups = '/'.join(self.path) or 'Conv', self.feature_group_count
        if x.shape[-1] % groups or self.features % groups:
            raise UserError(
                f'{layer}: {groups} groups must divide both the {x.shape[-1]} channels of '
                f'its input and its {self.features} features'
            )
        # conv2d would refuse the same window, without knowing the layer's name.
        window = self.kernel_size, self.strides, self.kernel_dilation, self.padding
        output_shape(x.shape[1:3], *window, layer=layer)
        shape = (*pair(self.kernel_size), x.shape[-1] // groups, self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        if self.standardize:
            kernel = standardize_kernel(kernel)
        bias = None
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        options = {'dilation': self.kernel_dilation, 'groups': groups, 'winograd': self.winograd}
        y = conv2d(x, kernel, stride=self.strides, padding=self.padding, **options)
        y = y if bias is None else add_bias(y, bias)
        return y if self.activation is None else self.activation(y)


def standardize_kernel(kernel: Float[Array, 'kh kw c f']) -> Float[Array, 'kh kw c f']:
    """Give each filter of a kernel mean 0 and variance 1.

    ŵ[…,f] = (w[…,f] − μ_f) / √(σ_f² + ε), μ_f and σ_f² the mean and biased variance of filter f

    The gradient passes through μ and σ. ε is 1e-5, so that a constant filter becomes 0.

    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization".

    >>> nn.standardize_kernel(jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)).round(2).ravel().tolist()
    [-1.0, 1.0]
    """
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(centred**2, axis=(0, 1, 2), keepdims=True)
    return centred * lax.rsqrt(variance + _EPSILON)


@jax.custom_jvp
def add_bias(x: Float[Array, '... c'], bias: Float[Array, ' c']) -> Float[Array, '... c']:
    """x + bias, whose gradient is summed as `broadcast_channels` says."""
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


@add_bias.defjvp
def _add_bias_jvp(primals, tangents):
    dx, dbias = tangents
    return add_bias(*primals), dx + broadcast_channels(dbias, dx.shape)


def max_pool(
    x: Float[Array, 'b h w c'], window: Size, stride: Size | None = None, padding: str = 'VALID'
) -> Float[Array, 'b h2 w2 c']:
    """The largest value of each window; the first of equal ones receives the gradient.

    Args:
        x: Images.
        window: Height and width of a window, in pixels; a single number means a square.
        stride: Pixels between neighbouring windows; None: the window's own size.
        padding: VALID, which ignores what does not fill a window, or SAME, TensorFlow's rule; a
            maximum takes SAME_TORCH, too.

    Returns and errors: As `conv2d`.

    >>> nn.max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).item()
    3.0
    """
    _refuse_padding(padding, ('VALID', 'SAME', 'SAME_TORCH'), 'max_pool')
    size, stride = x.shape[1:3], pair(stride or window)
    height, width = output_shape(size, window, stride, 1, padding, layer='max_pool')
    pads = resolve_padding(padding, size, window, stride)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    n, *_, channels = x.shape  # an exported network has any number of images
    end, steps = ((height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1), (1, *stride, 1)
    # One strided slice for each pixel of the window: XLA's own window reduction is three times
    # slower on a CPU, its gradient, a scatter, fifty times, and jaxlib 0.12 computes it wrongly for
    # bfloat16 (3e38 where 8 is right, after two convolutions).
    shifts = [
        lax.slice(x, (0, i, j, 0), (n, i + end[0], j + end[1], channels), steps)
        for i, j in itertools.product(*map(range, pair(window)))
    ]
    return functools.reduce(lambda a, b: jnp.where((a >= b) | jnp.isnan(a), a, b), shifts)


def avg_pool(
    x: Float[Array, 'b h w c'], window: Size, stride: Size | None = None, padding: str = 'VALID'
) -> Float[Array, 'b h2 w2 c']:
    """The mean of each window, over those of its pixels that lie in the image.

    Arguments, result and errors as `max_pool`. (PyTorch counts the padding too, Keras does not.)

    >>> nn.avg_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).item()
    1.5
    """
    _refuse_padding(padding, ('VALID', 'SAME'), 'avg_pool')
    stride = stride or window
    output_shape(x.shape[1:3], window, stride, 1, padding, layer='avg_pool')
    settings = {'window_shape': pair(window), 'strides': pair(stride), 'padding': padding}
    wide = x.astype(compute_type(x))
    means = nn.avg_pool(wide, **settings, count_include_pad=False)  # by name, as jax2onnx has it
    return means.astype(x.dtype)


def _refuse_padding(padding: Padding, names: tuple[str, ...], layer: str) -> None:
    if isinstance(padding, str) and padding not in names:
        raise UserError(f'{layer}: padding is {padding!r}; it can be {" or ".join(names)}')


def global_avg_pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b c']:
    """The mean of each channel over the image, added up in float32 and returned in x's type.

    >>> nn.global_avg_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
    [[1.5]]
    """
    return jnp.mean(x, axis=(1, 2))
