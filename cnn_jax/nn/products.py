"""A convolution and its two gradients, each a primitive whose derivatives are the other two.

Where they can be, float32 products on a CPU are those of `nn.native`; all others are XLA's.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cnn_jax.nn import native
from cnn_jax.nn.cpu import on_cpu, takes_plain_operations
from cnn_jax.nn.padding import Pair


class Window(NamedTuple):
    """A convolution's sizes (of image and kernel, in pixels and taps) and settings."""

    size: Pair
    taps: Pair
    stride: Pair
    pads: tuple[Pair, Pair]
    dilation: Pair
    groups: int
    winograd: bool


def convolve(x: Any, kernel: Any, window: Window) -> Any:
    """`nn.conv.conv2d`, its padding resolved; differentiable in every mode."""
    if takes_plain_operations(x, kernel):
        return _conv(x, kernel, window)
    return _CONV.bind(x, kernel, window=window, mapped=())


# By XLA, of one run or, with further leading axes, of runs trained together. Gradients of the
# latter are transposed from their grouped convolution, since cuDNN has those, too; mapped over
# themselves they would become forward convolutions with windows as large as the image.


def _conv(x, kernel, window):
    """y[b,i,j,f] = Σ_{p,q,c} x̃[b, i·s + p·d, j·s + q·d, c] · k[p,q,c,f]."""
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=window.stride,
        padding=window.pads,
        rhs_dilation=window.dilation,
        feature_group_count=window.groups,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    for _ in range(x.ndim - 4):
        conv = jax.vmap(conv)
    return conv(x, kernel)


def _input_gradient(dy, kernel, window):
    """dx̃[b,i,j,c] = Σ_{p,q,f} dy[b, (i − p·d)/s, (j − q·d)/s, f] · k[p,q,c,f], where s divides."""
    shape = (*dy.shape[:-4], *_image_shape(dy.shape[-4:], kernel.shape[-4:], window))
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda x: _conv(x, kernel, window), x)(dy)[0]


def _kernel_gradient(x, dy, window):
    """dk[p,q,c,f] = Σ_{b,i,j} x̃[b, i·s + p·d, j·s + q·d, c] · dy[b,i,j,f]."""
    shape = (*dy.shape[:-4], *_kernel_shape(x.shape[-4:], dy.shape[-4:], window))
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _conv(x, kernel, window), kernel)(dy)[0]


def _output_shape(x, kernel, window):
    axes = zip(*window[:5])
    size = [(n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, k, s, pad, d in axes]
    return (x[0], *size, kernel[3])


def _image_shape(dy, kernel, window):
    return (dy[0], *window.size, kernel[2] * window.groups)


def _kernel_shape(x, dy, window):
    return (*window.taps, x[3] // window.groups, dy[3])


# Each product is linear in both operands, and its transposes are the other two. `mapped` holds the
# mapped axis (0 or None) of both operands for each `vmap` around them, the outermost first.
# `_is_native` decides, in lowering, whether the library or XLA computes them.


def _is_native(context: Any, operands: Sequence[Any]) -> bool:
    """Return whether the native library computes a product: on the one CPU of a program here.

    Several devices divide XLA's own convolutions among them, but not a call of a library; and a
    program that is exported, or traced for another platform, runs elsewhere.
    """
    module = context.module_context
    return (
        on_cpu()
        and not module.lowering_parameters.for_export
        and getattr(module.axis_context, 'num_devices', None) == 1
        and all(x.dtype == jnp.float32 and x.size for x in (*operands, *context.avals_out))
        and native.available()
    )


def _call_native(name, shape, operands, window, mapped):
    """The product, all runs that are mapped over in one call."""
    runs = shape[:-4]

    def stacked(x, axes):
        if all(axis is None for axis in axes):
            return x
        own = iter(x.shape)
        leading = [1 if axis is None else next(own) for axis in axes]
        x = jnp.broadcast_to(x.reshape(*leading, *x.shape[-4:]), (*runs, *x.shape[-4:]))
        return x.reshape(-1, *x.shape[-4:])

    operands = [stacked(x, axes) for x, axes in zip(operands, zip(*mapped))] if mapped else operands
    before = (lo for lo, _ in window.pads)
    numbers = np.array([*window.stride, *before, *window.dilation, window.groups], np.int64)
    settings = {'window': numbers, 'winograd': window.winograd}
    out = (math.prod(runs), *shape[-4:]) if mapped else shape
    return native.call(name, out, *operands, **settings).reshape(shape)


def _runs(shapes, mapped):
    """How many runs each level maps over."""
    own = [iter(shape) for shape in shapes]
    counts = [[next(n) for n, axis in zip(own, level) if axis is not None] for level in mapped]
    return tuple(count[0] for count in counts)


def _product(name: str, function: Callable, shape: Callable) -> Primitive:
    """The primitive of a product that XLA computes by `function`, its result of `shape`."""

    def abstract(left, right, *, window, mapped):
        if left.dtype != right.dtype:
            raise TypeError(f'a convolution of {left.dtype} with {right.dtype}')
        runs = _runs((left.shape, right.shape), mapped)
        one = shape(left.shape[-4:], right.shape[-4:], window)
        return core.ShapedArray((*runs, *one), left.dtype)

    def compute(left, right, *, window, mapped):
        run = functools.partial(function, window=window)
        # All images of a shared kernel are one batch. On a CPU, XLA takes groups of a batch apart
        # by products with 0, and what is not finite in one run would be so in all.
        if on_cpu() or any(None in axes for axes in mapped):
            for axes in reversed(mapped):
                run = jax.vmap(run, axes)
        return run(left, right)

    def lower(context, *operands, window, mapped):
        shape = context.avals_out[0].shape

        def library(*operands):
            return _call_native(name, shape, operands, window, mapped)

        by_xla = functools.partial(compute, window=window, mapped=mapped)
        chosen = library if _is_native(context, context.avals_in) else by_xla
        return mlir.lower_fun(chosen, multiple_results=False)(context, *operands)

    def alone(left, right, *, window, mapped):  # without jit `compiled` would call this
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return compute(left, right, window=window, mapped=mapped)
        return compiled(left, right, window=window, mapped=mapped)

    def batch(operands, batched, *, window, mapped):
        moved = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, batched)]
        level = tuple(None if a is None else 0 for a in batched)
        return primitive.bind(*moved, window=window, mapped=(level, *mapped)), 0

    primitive = Primitive(name)
    compiled = jax.jit(primitive.bind, static_argnames=('window', 'mapped'))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    primitive.def_impl(alone)
    mlir.register_lowering(primitive, lower, platform='cpu')
    batching.primitive_batchers[primitive] = batch
    return primitive


_CONV = _product('conv', _conv, _output_shape)
_INPUT_GRADIENT = _product('conv_input_gradient', _input_gradient, _image_shape)
_KERNEL_GRADIENT = _product('conv_kernel_gradient', _kernel_gradient, _kernel_shape)


def _transpose(product: Primitive, known: int, cotangent_first: bool) -> Callable:
    """The cotangent of one operand: `product` of the result's cotangent and the known operand."""

    def rule(ct, *operands, window, mapped):
        pairs = [(ct, (0,) * len(mapped)), (operands[known], [level[known] for level in mapped])]
        (left, left_axes), (right, right_axes) = pairs if cotangent_first else pairs[::-1]
        levels = tuple(zip(left_axes, right_axes))
        out = product.bind(left, right, window=window, mapped=levels)
        # An operand that some `vmap` does not map has one cotangent for all of its calls.
        shared = tuple(i for i, level in enumerate(mapped) if level[1 - known] is None)
        return jnp.sum(out, axis=shared) if shared else out

    return rule


ad.defbilinear(  # of image and kernel
    _CONV, _transpose(_INPUT_GRADIENT, 1, True), _transpose(_KERNEL_GRADIENT, 0, False)
)
ad.defbilinear(  # of the output's gradient and the kernel
    _INPUT_GRADIENT, _transpose(_CONV, 1, True), _transpose(_KERNEL_GRADIENT, 0, True)
)
ad.defbilinear(  # of image and the output's gradient
    _KERNEL_GRADIENT, _transpose(_INPUT_GRADIENT, 1, False), _transpose(_CONV, 0, False)
)
