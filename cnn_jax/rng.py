"""Randomness without state: every key follows from (seed, stream, step)."""

import jax
from jaxtyping import Array, Key

# A stream's number is part of every result ever reported: never reuse or renumber one.
STREAMS = {'params': 0, 'augment': 1, 'dropout': 2, 'gradient_noise': 3}


def key(seed: int | Array, stream: str, step: int | Array = 0) -> Key[Array, '']:
    """The key of one random stream at one step.

    key = fold_in(fold_in(key(seed), STREAMS[stream]), step)

    Args:
        seed: The run's seed, in [0, 2³²); may be traced.
        stream: A name in `STREAMS`.
        step: Update count, ≥ 0; may be traced.

    Returns:
        A threefry key. Nothing has to be saved to draw the same numbers again.
    """
    root = jax.random.key(seed, impl='threefry2x32')
    return jax.random.fold_in(jax.random.fold_in(root, STREAMS[stream]), step)
