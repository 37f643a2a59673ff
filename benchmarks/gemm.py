"""The yardstick: a square matrix product, the fastest arithmetic that XLA has on the machine."""

import jax
import jax.numpy as jnp

from benchmarks.problem import Problem
from benchmarks.worker import Contender

SIZE = 2048
FLOPS = 2 * SIZE**3


def start(problem: Problem) -> Contender:
    """One step is a product of two float32 matrices of `SIZE`²."""
    del problem
    multiply = jax.jit(jnp.matmul)
    a = jax.random.normal(jax.random.key(0), (SIZE, SIZE))

    def run(count: int) -> None:
        for _ in range(count):
            product = multiply(a, a)
        jax.block_until_ready(product)

    return Contender(lambda _: [], run, f'jax {jax.__version__}')
