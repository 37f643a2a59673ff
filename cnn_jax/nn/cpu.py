"""Substitutes for what XLA's CPU compiler does slowly; private to `cnn_jax.nn`."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jaxtyping import Array, Float

_chosen = contextvars.ContextVar('platform', default='')


def platform() -> str:
    """The platform that the computation that is traced now is for: cpu, gpu, tpu or onnx."""
    return _chosen.get() or jax.default_backend()


def on_cpu() -> bool:
    """Return whether the computation that is traced now will run on a CPU."""
    return platform() == 'cpu'


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace for another platform than this process's: `tpu`, `gpu` or `onnx`."""
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)


def takes_plain_operations(*arrays: Array) -> bool:
    """Return whether JAX's own operations must compute on these arrays, not primitives of ours.

    ONNX's converter knows those alone. And JAX's alone say in their types how a mesh divides the
    result: along explicit axes, or within a `shard_map` that checks it.
    """
    return platform() == 'onnx' or any(_is_divided(jax.typeof(x)) for x in arrays)


def _is_divided(of: core.ShapedArray) -> bool:
    if of.sharding.mesh.empty:
        return False
    undivided = core.ShapedArray(of.shape, of.dtype, of.weak_type, sharding=of.sharding)
    return AxisType.Explicit in of.sharding.mesh.axis_types or of != undivided


# Terms of a sum that XLA unrolls, and so computes in vectors; of more, each takes up to three times
# as long.
UNROLLED = 24
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
    row = jnp.broadcast_to(wide, (width, channels)).reshape(-1)
    rows = jnp.broadcast_to(row, (math.prod(shape[:-2]), row.size))
    return rows.reshape(shape).astype(b.dtype)


def sum_pair(
    u: Float[Array, '...'], v: Float[Array, '...'], axes: tuple[int, ...], paired: bool
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Sums of two arrays of one shape over the same axes, ascending.

    Paired, both are read together by one reduction, which takes half the time of two. Of such a
    reduction XLA gathers every device's part on each, where it adds up plain sums.
    """
    if not paired:
        return jnp.sum(u, axis=axes), jnp.sum(v, axis=axes)
    zero = jnp.zeros((), u.dtype)

    def reduce(u, v, axes):
        return lax.reduce((u, v), (zero, zero), lambda s, t: (s[0] + t[0], s[1] + t[1]), axes)

    if on_cpu() and len(axes) > 1:
        column = axes[-2]  # of an image first, so that the inner loop is contiguous
        height = u.shape[column]
        run = next((n for n in range(UNROLLED, 3, -1) if height % n == 0), height)
        if run < height:
            shape = *u.shape[:column], height // run, run, *u.shape[column + 1 :]
            u, v = u.reshape(shape), v.reshape(shape)
            axes = *axes[:-1], column + 1, axes[-1] + 1
            column += 1
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
    if takes_plain_operations(x, a, b):
        return _scale_and_shift(x, a, b, axes=axes)
    return _SCALE_AND_SHIFT.bind(x, a, b, axes=axes)


def sums_with(
    x: Float[Array, '...'], u: Float[Array, '...'], axes: tuple[int, ...]
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Σu and Σu·x over `axes`, ascending, read together on a CPU and on one GPU.

    As a function of u it is the transpose of `scale_and_shift`.
    """
    if takes_plain_operations(x, u):
        return _sums_with(x, u, axes=axes, paired=False)
    total, product = _SUMS_WITH.bind(x, u, axes=axes)
    return total, product


def _scale_and_shift(x, a, b, *, axes):
    return x * jnp.expand_dims(a, axes) + jnp.expand_dims(b, axes)


def _sums_with(x, u, *, axes, paired=None):
    if not axes:
        return u, u * x
    return sum_pair(u, u * x, axes, paired=on_cpu() if paired is None else paired)


def _lower_sums(context, *operands, axes):
    devices = getattr(context.module_context.axis_context, 'num_devices', None)
    paired = on_cpu() or (platform() == 'gpu' and devices == 1)
    function = functools.partial(_sums_with, axes=axes, paired=paired)
    return mlir.lower_fun(function, multiple_results=True)(context, *operands)


_SCALE_AND_SHIFT = _primitive('scale_and_shift', _scale_and_shift)
_SUMS_WITH = _primitive('sums_with', _sums_with, outputs=2)
mlir.register_lowering(_SUMS_WITH, _lower_sums)


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
