"""Where XLA must not fuse."""

import jax
from jax import lax


def stored(x):
    """x, computed once and kept in memory, on a CPU.

    XLA's CPU compiler computes cheap arithmetic again in every loop that reads its result, also
    in a transposition or a sum, where it is not cheap. `runtime.prepare` makes it respect
    barriers; without that this does nothing.
    """
    return lax.optimization_barrier(x) if jax.default_backend() == 'cpu' else x
