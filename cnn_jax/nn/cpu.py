"""Everything that exists only because XLA's CPU compiler is slow; a private matter of `cnn_jax.nn`.

XLA hands a float32 convolution to Eigen, whose speed depends on how it is asked. Each form here
computes the same sums and is used where it measured fastest. All convolutions are written
in the form in which Eigen takes them (images NHWC, kernels HWIO): XLA brings others into it only
outside of loops, and runs them ten times slower inside of one.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.nn.padding import Pair

_chosen = contextvars.ContextVar('platform', default='')


def on_cpu() -> bool:
    """Whether the computation that is traced now will run on a CPU."""
    return (_chosen.get() or jax.default_backend()) == 'cpu'


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace for another platform than this process's, `tpu` or `gpu`, while the context lasts."""
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)


# XLA compiles loops over little data in a way of their own, which knows no barriers; and there is
# nothing to win.
_LEAST_BYTES = 2**16


def materialize(x):
    """x, computed once and kept in memory, on a CPU.

    XLA's CPU compiler computes cheap arithmetic again in every loop that reads its result, also
    in a transposition or a sum, where it is not cheap. `runtime.configure` makes it respect
    barriers; without that this does nothing.
    """
    if not on_cpu() or x.size * x.dtype.itemsize < _LEAST_BYTES:
        return x
    return lax.optimization_barrier(x)


def channel_sums(x: Float[Array, '... c']) -> Float[Array, ' c']:
    """The sum over every axis but the last.

    On a CPU down whole rows of images first: XLA adds up long contiguous rows 2 to 10 times faster
    than channels, one by one.
    """
    if x.ndim < 3 or not on_cpu():
        return jnp.sum(x, axis=tuple(range(x.ndim - 1)))
    *_, width, channels = x.shape
    rows = x.reshape(-1, width * channels)
    row = lax.reduce(rows, jnp.zeros((), x.dtype), lax.add, (0,))
    return jnp.sum(row.reshape(width, channels), axis=0)


def sum_pair(
    u: Float[Array, '...'], v: Float[Array, '...'], axes: tuple[int, ...]
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Sums of two arrays of one shape over the same axes, ascending.

    On a CPU read together, which takes half the time. Elsewhere as two plain sums: those XLA adds
    up among devices, whereas of a reduction of two arrays it gathers every device's part to add
    them up on each, n times the bytes on n devices.
    """
    if not on_cpu():
        return jnp.sum(u, axis=axes), jnp.sum(v, axis=axes)
    zero = jnp.zeros((), u.dtype)

    def reduce(u, v, axes):
        return lax.reduce((u, v), (zero, zero), lambda s, t: (s[0] + t[0], s[1] + t[1]), axes)

    if len(axes) > 1:  # First down the columns of an image, so that the inner loop is contiguous.
        column = axes[-2]
        u, v = reduce(u, v, (column,))
        axes = tuple(a - (a > column) for a in axes if a != column)
    return reduce(u, v, axes)


_FEW = 16  # numbers in a window: 3×3 taps of a grey image are 9


def convolve(x, kernel, stride: Pair, pads: tuple[Pair, Pair], dilation: Pair) -> Any:
    """`nn.conv.conv2d` of one group, its padding resolved; differentiable in reverse mode."""
    # Eigen is 5 to 100 times slower where the kernel outgrows the image.
    if any(k > n for k, n in zip(kernel.shape, x.shape[1:3])):
        return _by_matmul(x, kernel, stride, pads, dilation)
    return _convolve(x, kernel, stride, pads, dilation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, stride, pads, dilation):
    # Eigen is three times slower where a window holds few numbers. (A sum that XLA fuses is faster
    # by itself, but what is fused is computed again wherever the result is read.)
    if _few(x, kernel):
        return _by_rows(x, kernel, stride, pads, dilation)
    return direct(x, kernel, stride, pads, dilation)


def _forward(x, kernel, *window):
    return _convolve(x, kernel, *window), (x, kernel)


def _backward(stride, pads, dilation, inputs, dy):
    (x, kernel), dy = inputs, materialize(dy)  # dy is read more than once
    dx = _input_gradient(dy, kernel, x.shape[1:3], stride, pads, dilation)
    if _few(x, kernel):
        return dx, _kernel_gradient_by_rows(x, dy, kernel.shape, stride, pads, dilation)
    return dx, _kernel_gradient(x, dy, kernel.shape[:2], stride, pads, dilation)


_convolve.defvjp(_forward, _backward)


def _few(x, kernel):
    return math.prod(kernel.shape[:3]) <= _FEW and x.dtype == jnp.float32


def direct(x, kernel, stride=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), spread=(1, 1)):
    """XLA's convolution; `spread` is the distance between neighbouring pixels of x."""

    # Many models one after the other: as groups of one convolution they take 2 to 3 times as long.
    @jax.custom_batching.sequential_vmap
    def one(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=stride,
            padding=pads,
            lhs_dilation=spread,
            rhs_dilation=dilation,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

    return one(x, kernel)


def _kernel_gradient(x, dy, taps, stride, pads, dilation):
    """dk[p,q,c,f] = Σ_{b,i,j} x̃[b, i·s + p·d, j·s + q·d, c] · dy[b,i,j,f].

    A convolution again: channels take the place of images and images that of channels, and dy
    that of the kernel, with stride and dilation exchanged.
    """
    axes = zip(x.shape[1:3], taps, dy.shape[1:3], stride, pads, dilation)
    # So that exactly `taps` positions of dy fit.
    pads = [(lo, (k - 1) * d + (o - 1) * s + 1 - n - lo) for n, k, o, s, (lo, _), d in axes]
    result = direct(
        materialize(x).transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        dilation,
        pads,
        dilation=stride,
    )
    return result.transpose(1, 2, 0, 3)


def _kernel_gradient_by_rows(x, dy, shape, *window):
    """The same as a product of the windows with dy, which stays as it lies."""
    rows = _rows(x, shape, *window)
    return (rows.reshape(len(rows), -1) @ dy.reshape(-1, shape[-1])).reshape(shape)


def _input_gradient(dy, kernel, size, stride, pads, dilation):
    """dx̃[b,i,j,c] = Σ_{p,q,f} dy[b, (i − p·d)/s, (j − q·d)/s, f] · k[p,q,c,f], where these divide.

    Pixels whose positions leave the same remainder after division by s see the same taps: each
    such phase is a convolution without gaps, and the phases are woven into one another. Filling
    dy with zeros between its pixels instead is up to 1.8 times slower.
    """
    if any(s > 1 and d > 1 for s, d in zip(stride, dilation)):
        return _input_gradient_by_gaps(dy, kernel, size, stride, pads, dilation)
    first = [lo // s for (lo, _), s in zip(pads, stride)]
    count = [-(-(lo + n) // s) - m for n, s, (lo, _), m in zip(size, stride, pads, first)]

    def phase(*remainders):
        taps = kernel[remainders[0] :: stride[0], remainders[1] :: stride[1]]
        if not taps.size:
            return jnp.zeros((dy.shape[0], *count, kernel.shape[2]), dy.dtype)
        reach = [(k - 1) * d for k, d in zip(taps.shape[:2], dilation)]
        around = [(r - m, n + m - o) for r, m, n, o in zip(reach, first, count, dy.shape[1:3])]
        return direct(dy, taps[::-1, ::-1].swapaxes(2, 3), pads=around, dilation=dilation)

    if stride == (1, 1):
        return phase(0, 0)
    rows = [jnp.stack([phase(r, q) for q in range(stride[1])], axis=3) for r in range(stride[0])]
    woven = jnp.stack(rows, axis=2)  # [b, count, stride, count, stride, c]
    woven = woven.reshape(dy.shape[0], count[0] * stride[0], count[1] * stride[1], -1)
    top, left = (lo - m * s for (lo, _), m, s in zip(pads, first, stride))
    return woven[:, top : top + size[0], left : left + size[1]]


def _input_gradient_by_gaps(dy, kernel, size, stride, pads, dilation):
    axes = zip(size, kernel.shape[:2], dy.shape[1:3], stride, pads, dilation)
    around = [((k - 1) * d - lo, n + lo - (o - 1) * s - 1) for n, k, o, s, (lo, _), d in axes]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return direct(dy, flipped, pads=around, dilation=dilation, spread=stride)


def _by_matmul(x, kernel, stride, pads, dilation):
    """The same convolution as one product: the windows as rows, the kernel as a matrix."""
    windows = jnp.concatenate(list(_shifted(x, kernel.shape, stride, pads, dilation)), axis=-1)
    return windows @ kernel.reshape(-1, kernel.shape[-1])


def _by_rows(x, kernel, *window):
    """The same as a product with the windows as columns: few rows, each of them long."""
    rows = _rows(x, kernel.shape, *window)
    height, width = rows.shape[2:]
    y = jnp.einsum('kn,kf->nf', rows.reshape(len(rows), -1), kernel.reshape(len(rows), -1))
    return y.reshape(x.shape[0], height, width, -1)


def _rows(x, kernel_shape, *window):
    """Number k of every window, [k, b, i, j]."""
    taps = _shifted(x, kernel_shape, *window)
    return jnp.stack([tap[..., c] for tap in taps for c in range(x.shape[-1])])


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
