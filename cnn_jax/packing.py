"""Many small arrays as one vector, for a GPU: each array for itself costs a kernel or two.

XLA no longer joins kernels that have nothing in common. Those that read the same array it joins, if
their results are of one shape. Arrays of `mesh.LARGE` elements are left alone: they are worth their
kernels, and several devices may divide them.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from cnn_jax.mesh import LARGE
from cnn_jax.nn.cpu import platform
from cnn_jax.params import Flat


def joined(leaves: Sequence[Array]) -> list[Array]:
    """The arrays for a sum over all of them: on a GPU the small ones end to end, as one."""
    small = [leaf.ravel() for leaf in leaves if leaf.size < LARGE]
    if platform() != 'gpu' or len(small) < 2:
        return list(leaves)
    return [jnp.concatenate(small), *(leaf for leaf in leaves if leaf.size >= LARGE)]


def packed(flat: Flat) -> Flat:
    """The arrays as they are; on a GPU the small ones lie in one vector first.

    What an optimizer does to arrays of one shape is one kernel then, in their own order of axes:
    the gradients of convolutions come in cuDNN's, in which XLA would else copy all moments.
    """
    small = {path: leaf for path, leaf in flat.items() if leaf.size < LARGE}
    if platform() != 'gpu' or len(small) < 2:
        return flat
    vector, unravel = ravel_pytree(small)
    return flat | unravel(lax.optimization_barrier(vector))
