"""Where XLA must not fuse."""

from jax import lax

from cnn_jax.nn.platform import on_cpu

# XLA compiles loops over little data in a way of their own, which knows no barriers; and there is
# nothing to win.
LEAST = 2**16  # bytes


def stored(x):
    """x, computed once and kept in memory, on a CPU.

    XLA's CPU compiler computes cheap arithmetic again in every loop that reads its result, also
    in a transposition or a sum, where it is not cheap. `runtime.prepare` makes it respect
    barriers; without that this does nothing.
    """
    if not on_cpu() or x.size * x.dtype.itemsize < LEAST:
        return x
    return lax.optimization_barrier(x)
