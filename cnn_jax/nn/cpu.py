"""Everything that exists only because XLA's CPU compiler is slow; a private matter of `cnn_jax.nn`.

Convolutions of float32 are those of `nn.native`. Where there are none, they are written in the form
in which XLA hands them to Eigen (images NHWC, kernels HWIO), since it brings others into it only
outside of loops, and runs them ten times slower inside of one.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from cnn_jax.nn import native
from cnn_jax.nn.padding import Pair

_chosen = contextvars.ContextVar('platform', default='')


def platform() -> str:
    """The platform that the computation that is traced now will run on: cpu, gpu or tpu."""
    return _chosen.get() or jax.default_backend()


def on_cpu() -> bool:
    """Return whether the computation that is traced now will run on a CPU."""
    return platform() == 'cpu'


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace for another platform than this process's, `tpu` or `gpu`."""
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)


_LEAST_BYTES = 2**16  # in loops over less XLA knows no barriers, and there is nothing to win


def materialize(x):
    """x, computed once and kept in memory on a CPU, where XLA else computes it in each loop again.

    Barriers are respected where `runtime.configure` has been called.
    """
    if not on_cpu() or x.size * x.dtype.itemsize < _LEAST_BYTES:
        return x
    return lax.optimization_barrier(x)


def compute_type(x: Array) -> jnp.dtype:
    """The type in which sums and noise are computed: float32, or x's if that is wider."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def broadcast_channels(b: Float[Array, ' c'], shape: tuple[int, ...]) -> Float[Array, '... c']:
    """b along the last axis of an array of this shape.

    Its transpose, a bias's gradient, sums down whole rows of images first on a CPU: 2 to 10 times
    faster.
    """
    wide = b.astype(compute_type(b))  # in which the sum adds up
    if len(shape) < 3 or not on_cpu():
        return jnp.broadcast_to(wide, shape).astype(b.dtype)
    *_, width, channels = shape
    row = jnp.broadcast_to(wide, (width, channels)).astype(b.dtype).reshape(-1)
    return jnp.broadcast_to(row, (math.prod(shape[:-2]), row.size)).reshape(shape)


def sum_pair(
    u: Float[Array, '...'], v: Float[Array, '...'], axes: tuple[int, ...]
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Sums of two arrays of one shape over the same axes, ascending.

    On a CPU read together, in half the time. Elsewhere two plain sums, which XLA adds up among
    devices; of a reduction of two arrays it gathers every device's part on each.
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


# The operations below are primitives of JAX's, closed under differentiation: every mode and order
# works. (What JAX makes of the plain formulas is slow on a CPU; a `custom_vjp` has no forward mode
# and, around `sequential_vmap`, no second derivatives.) They are compiled in line.


def _primitive(name: str, function: Callable, outputs: int = 1) -> Primitive:
    """A primitive that computes `function(*arrays, **settings)`, the settings hashable."""
    primitive = Primitive(name)
    primitive.multiple_results = outputs > 1

    @functools.cache
    def shapes(operands, settings):
        arrays = [jax.ShapeDtypeStruct(*operand) for operand in operands]
        return jax.eval_shape(functools.partial(function, **dict(settings)), *arrays)

    def abstract(*avals, **settings):
        operands = tuple((aval.shape, aval.dtype) for aval in avals)
        out = shapes(operands, tuple(settings.items()))
        return jax.tree.map(lambda s: core.ShapedArray(s.shape, s.dtype), out)

    primitive.def_impl(function)
    primitive.def_abstract_eval(abstract)
    lowering = mlir.lower_fun(function, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering)
    return primitive


def scale_and_shift(
    x: Float[Array, '...'], a: Float[Array, '...'], b: Float[Array, '...'], axes: tuple[int, ...]
) -> Float[Array, '...']:
    """x·a + b, a and b shaped like the axes of x that are not in `axes`.

    The gradients of a and b are `sums_with`.
    """
    if on_cpu():
        return _SCALE_AND_SHIFT.bind(x, a, b, axes=axes)
    return _scale_and_shift(x, a, b, axes=axes)


def sums_with(
    x: Float[Array, '...'], u: Float[Array, '...'], axes: tuple[int, ...]
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Σu and Σu·x over `axes`, ascending, read together on a CPU.

    As a function of u it is the transpose of `scale_and_shift`.
    """
    if on_cpu():
        total, product = _SUMS_WITH.bind(x, u, axes=axes)
        return total, product
    return _sums_with_as_one(x, u, axes=axes)


def _scale_and_shift(x, a, b, *, axes):
    return x * jnp.expand_dims(a, axes) + jnp.expand_dims(b, axes)


def _sums_with(x, u, *, axes):
    return sum_pair(u, u * x, axes) if axes else (u, u * x)


# As one function its transpose is one sum of two terms, in the primitive's order of additions.
_sums_with_as_one = jax.jit(_sums_with, static_argnames='axes')

_SCALE_AND_SHIFT = _primitive('scale_and_shift', _scale_and_shift)
_SUMS_WITH = _primitive('sums_with', _sums_with, outputs=2)


def _scale_and_shift_jvp(primals, tangents, *, axes):
    x, a, _ = primals
    dx, da, db = tangents
    terms = []
    if not type(da) is type(db) is ad.Zero:
        da, db = ad.instantiate_zeros(da), ad.instantiate_zeros(db)
        terms.append(_SCALE_AND_SHIFT.bind(x, da, db, axes=axes))
    if type(dx) is not ad.Zero:
        terms.append(dx * jnp.expand_dims(a, axes))
    return _SCALE_AND_SHIFT.bind(*primals, axes=axes), sum(terms[1:], start=terms[0])


def _scale_and_shift_transpose(dy, x, a, b, *, axes):
    db, da = _SUMS_WITH.bind(x, ad.instantiate_zeros(dy), axes=axes)
    return None, da, db


def _sums_with_jvp(primals, tangents, *, axes):
    x, u = primals
    dx, du = tangents
    total, product = _SUMS_WITH.bind(x, ad.instantiate_zeros(du), axes=axes)
    if type(dx) is not ad.Zero:
        product += jnp.sum(u * dx, axis=axes)
    return _SUMS_WITH.bind(x, u, axes=axes), (total, product)


def _sums_with_transpose(sums, x, u, *, axes):
    total, product = (ad.instantiate_zeros(ct) for ct in sums)
    return None, _SCALE_AND_SHIFT.bind(x, product, total, axes=axes)


def _batched_over_axes(primitive, operands, batched, *, axes):
    """Another leading axis for every operand: none of those that are summed over."""
    size = next(x.shape[a] for x, a in zip(operands, batched) if a is not None)
    operands = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(operands, batched)
    ]
    out = primitive.bind(*operands, axes=tuple(a + 1 for a in axes))
    return out, [0] * len(out) if primitive.multiple_results else 0


ad.primitive_jvps[_SCALE_AND_SHIFT] = _scale_and_shift_jvp
ad.primitive_transposes[_SCALE_AND_SHIFT] = _scale_and_shift_transpose
ad.primitive_jvps[_SUMS_WITH] = _sums_with_jvp
ad.primitive_transposes[_SUMS_WITH] = _sums_with_transpose
for _each in (_SCALE_AND_SHIFT, _SUMS_WITH):
    batching.primitive_batchers[_each] = functools.partial(_batched_over_axes, _each)


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
    if on_cpu():
        return _CONV.bind(x, kernel, window=window, mapped=())
    return _by_xla(x, kernel, *window[2:6])


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


def _direct(x, kernel, *settings):
    """XLA's convolution; of many models one by one, as groups of one take 2 to 3 times as long."""
    one = jax.custom_batching.sequential_vmap(lambda x, kernel: _by_xla(x, kernel, *settings))
    return one(x, kernel)


def _conv(x, kernel, window):
    as_it_is = _as_defined(window)
    return _definition(x, kernel, window) if as_it_is else _direct(x, kernel, *window[2:5])


def _as_defined(window):
    """Whether the gradients, too, are what JAX makes of the definition."""
    outgrown = any(k > n for k, n in zip(window.taps, window.size))
    spread = any(s > 1 and d > 1 for s, d in zip(window.stride, window.dilation))
    return window.groups > 1 or outgrown or spread


def _definition(x, kernel, window):
    """The convolution in a form that JAX differentiates itself."""
    # Eigen is 5 to 100 times slower where the kernel outgrows the image.
    if window.groups == 1 and any(k > n for k, n in zip(window.taps, window.size)):
        return _by_matmul(x, kernel, window)
    return _by_xla(x, kernel, *window[2:6])


def _kernel_gradient(x, dy, window):
    """dk[p,q,c,f] = Σ_{b,i,j} x̃[b, i·s + p·d, j·s + q·d, c] · dy[b,i,j,f].

    A convolution again: channels take the place of images and images that of channels, and dy
    that of the kernel, with stride and dilation exchanged.
    """
    if _as_defined(window):
        kernel = jax.ShapeDtypeStruct(_kernel_shape(x.shape, dy.shape, window), x.dtype)
        return jax.linear_transpose(lambda k: _definition(x, k, window), kernel)(dy)[0]
    dy = materialize(dy)  # it is read more than once
    axes = zip(*window[:2], dy.shape[1:3], *window[2:5])
    # So that exactly `taps` positions of dy fit.
    pads = [(lo, (k - 1) * d + (o - 1) * s + 1 - n - lo) for n, k, o, s, (lo, _), d in axes]
    x, dy = materialize(x).transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return _direct(x, dy, window.dilation, pads, window.stride).transpose(1, 2, 0, 3)


def _input_gradient(dy, kernel, window):
    """dx̃[b,i,j,c] = Σ_{p,q,f} dy[b, (i − p·d)/s, (j − q·d)/s, f] · k[p,q,c,f], where these divide.

    Pixels whose positions leave the same remainder after division by s see the same taps: each such
    phase is a convolution, woven into the others, up to 1.8 times faster than dy filled with zeros.
    """
    size, _, stride, pads, dilation = window[:5]
    if _as_defined(window):
        x = jax.ShapeDtypeStruct(_image_shape(dy.shape, kernel.shape, window), dy.dtype)
        return jax.linear_transpose(lambda x: _definition(x, kernel, window), x)(dy)[0]
    dy = materialize(dy)
    first = [lo // s for (lo, _), s in zip(pads, stride)]
    count = [-(-(lo + n) // s) - m for n, s, (lo, _), m in zip(size, stride, pads, first)]

    def phase(*remainders):
        taps = kernel[remainders[0] :: stride[0], remainders[1] :: stride[1]]
        if not taps.size:
            return jnp.zeros((dy.shape[0], *count, kernel.shape[2]), dy.dtype)
        reach = [(k - 1) * d for k, d in zip(taps.shape[:2], dilation)]
        around = [(r - m, n + m - o) for r, m, n, o in zip(reach, first, count, dy.shape[1:3])]
        return _direct(dy, taps[::-1, ::-1].swapaxes(2, 3), (1, 1), around, dilation)

    if stride == (1, 1):
        return phase(0, 0)
    rows = [jnp.stack([phase(r, q) for q in range(stride[1])], axis=3) for r in range(stride[0])]
    woven = jnp.stack(rows, axis=2)  # [b, count, stride, count, stride, c]
    woven = woven.reshape(dy.shape[0], count[0] * stride[0], count[1] * stride[1], -1)
    top, left = (lo - m * s for (lo, _), m, s in zip(pads, first, stride))
    return woven[:, top : top + size[0], left : left + size[1]]


def _by_matmul(x, kernel, window):
    """The same convolution as one product: the windows as rows, the kernel as a matrix."""
    _, taps, stride, pads, dilation = window[:5]
    # lax.pad, since explicit padding may be negative.
    x = lax.pad(x, jnp.zeros((), x.dtype), [(lo, hi, 0) for lo, hi in ((0, 0), *pads, (0, 0))])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, taps)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, stride))
    shifted = []  # the input of each tap: the padded images, moved and strided
    for p, q in itertools.product(*map(range, taps)):
        top, left = p * dilation[0], q * dilation[1]
        bottom = top + stride[0] * (height - 1) + 1
        right = left + stride[1] * (width - 1) + 1
        shifted.append(x[:, top : bottom : stride[0], left : right : stride[1]])
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _output_shape(x, kernel, window):
    axes = zip(*window[:5])
    size = [(n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, k, s, pad, d in axes]
    return (x[0], *size, kernel[3])


def _image_shape(dy, kernel, window):
    return (dy[0], *window.size, kernel[2] * window.groups)


def _kernel_shape(x, dy, window):
    return (*window.taps, x[3] // window.groups, dy[3])


# A convolution's three products: each is linear in both operands, and its transposes are the other
# two. `mapped` holds the mapped axis (0 or None) of both operands for each `vmap` around them, the
# outermost first. `_is_native` decides, in lowering, whether the library or XLA computes them.


def _is_native(context: Any, operands: Sequence[Any]) -> bool:
    """Whether the native library computes a product: on the one CPU of a program that stays here.

    Several devices divide XLA's own convolutions among them, but not a call of a library; and a
    program that is exported runs elsewhere.
    """
    module = context.module_context
    return (
        not module.lowering_parameters.for_export
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
