"""Convolutions in C++, float32, NHWC and HWIO, faster than XLA's on a CPU.

`build` says how the library comes to a machine, the sources beside it how it computes. It is
called through XLA's foreign function interface and runs on XLA's threads; its results do not
depend on their number.
"""

import ctypes
import functools
from typing import Any

import jax
import numpy as np

from cnn_jax.nn.native.build import library

OPERATIONS = 'conv', 'conv_input_gradient', 'conv_kernel_gradient', 'conv_frozen', 'transform'


@functools.cache
def available() -> bool:
    """Return whether this machine has the library; builds it if need be, and makes XLA know it."""
    path = library().path
    if path is None:
        return False
    loaded = ctypes.CDLL(str(path))
    for name in OPERATIONS:
        capsule = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(_target(name), capsule, platform='cpu')
    return True


def call(name: str, shape: tuple[int, ...], *operands: Any, **settings: Any) -> Any:
    """The result, of a shape, of one of the library's operations."""
    out = jax.ShapeDtypeStruct(shape, np.float32)
    return jax.ffi.ffi_call(_target(name), out)(*operands, **settings)


def _target(name: str) -> str:
    # With the key, a compilation that JAX has kept never meets another library.
    return f'cnn_jax_{name}_{library().key}'
