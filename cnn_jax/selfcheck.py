"""A check at start-up that this machine computes right what training relies on."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import rng, runtime
from cnn_jax.errors import UserError
from cnn_jax.nn.conv import conv2d
from cnn_jax.nn.noise import dropout
from cnn_jax.nn.norm import batch_normalize

# Most inputs are whole numbers that TF32 and bfloat16 hold, with sums that float32 holds: on any
# device, in its default precision, the results are exact or a few roundings of float32 away.
FLOAT32 = 1e-5
BFLOAT16 = 2.0**-8  # one rounding of the result; sums in bfloat16 would be off by 10% and more
MOMENTS = 5e-3  # five standard errors of the mean of 2²⁰ normal numbers
EPSILON = 1e-3


@dataclass(frozen=True)
class Check:
    """A computation and what it must give.

    Attributes:
        name: What is computed.
        results: The names of its results.
        inputs: Its arguments.
        compute: In JAX.
        exact: In NumPy, floats as float64.
        tolerance: Of the largest error, as a share of the largest number of the exact result.
    """

    name: str
    results: tuple[str, ...]
    inputs: tuple[np.ndarray, ...]
    compute: Callable[..., Any]
    exact: Callable[..., Any]
    tolerance: float = FLOAT32


def self_check() -> None:
    """Compare the primitives of training with NumPy, and stop if one is computed wrongly.

    Errors:
        UserError: A result is wrong; the message says which, by how much, and what mends it.
    """
    checks = all_checks()
    compare(checks, computed(checks))


def all_checks() -> list[Check]:
    """All that is checked, with a convolution for each form that `nn.conv_cpu` gives it."""
    return [
        reductions(),
        convolution('convolution', size=32, channels=8),
        convolution('convolution of stride 2', size=32, channels=8, stride=2),
        convolution('convolution of grey images', size=32, channels=1),
        convolution('convolution of images smaller than its kernel', size=2, channels=8),
        matrix_product(),
        batch_normalization(),
        bfloat16_sums(),
        dropout_mask(),
        moments(),
    ]


def computed(checks: list[Check]) -> list[list[Any]]:
    """The results of each check, from one compiled program."""

    @jax.jit
    def program(inputs):  # arguments: XLA computes with constants while it compiles, by other code
        return [list(check.compute(*arrays)) for check, arrays in zip(checks, inputs)]

    return jax.device_get(program([check.inputs for check in checks]))


def compare(checks: list[Check], computed: list[list[Any]]) -> None:
    """Stop at the first result that is not what NumPy gives; errors as of `self_check`."""
    for check, results in zip(checks, computed, strict=True):
        exact = check.exact(*map(_wide, check.inputs))
        for name, result, right in zip(check.results, results, exact, strict=True):
            difference = np.subtract(result, right, dtype=np.float64)
            error = np.max(abs(difference)) / np.max(abs(right))
            if not error <= check.tolerance:  # so that NaN fails, too
                raise UserError(
                    f'XLA computes wrong results on this machine ({check.name}, {name}: off by '
                    f'{100 * error:.2g}% of its largest value); {_remedy()}'
                )


def reductions() -> Check:
    """Over many short rows and over a few long ones; sums of squares as in jax issue 39103."""
    table = _whole(0, 32769, 3, most=255)
    table[-1] = 256  # so that each maximum is where a loop has its last, partial round

    def compute(table, matrix):
        squares = jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(table)
        long = table.T.mean(1), table.T.max(1)
        return squares, table.sum(0), table.sum(1), table.max(0), table.max(1), *long

    def exact(table, matrix):
        squares = ((table @ matrix.T) ** 2).sum(1)
        long = table.mean(0), table.max(0)
        return squares, table.sum(0), table.sum(1), table.max(0), table.max(1), *long

    names = 'sum of squares', 'sum', 'sum of each row', 'maximum', 'maximum of each row'
    names += 'mean of long rows', 'maximum of long rows'
    return Check('reduction', names, (table, np.eye(3, dtype=np.float32)), compute, exact)


def convolution(name: str, size: int, channels: int, stride: int = 1) -> Check:
    """3×3 taps, SAME padding, and the gradients."""
    out = -(-size // stride)
    inputs = (
        _whole(0, 4, size, size, channels),
        _whole(1, 3, 3, channels, 16),
        _whole(2, 4, out, out, 16),
    )

    def compute(x, kernel, dy):
        y, pull = jax.vjp(functools.partial(conv2d, stride=stride), x, kernel)
        return y, *pull(dy)

    def exact(x, kernel, dy):
        total = (out - 1) * stride + 3 - size
        low, high = total // 2, total - total // 2
        x = np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
        y, dx, dkernel = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)
        for p, q in np.ndindex(3, 3):
            rows, columns = (slice(i, i + (out - 1) * stride + 1, stride) for i in (p, q))
            seen = x[:, rows, columns]
            y += seen @ kernel[p, q]
            dx[:, rows, columns] += dy @ kernel[p, q].T
            dkernel[p, q] = np.tensordot(seen, dy, ((0, 1, 2), (0, 1, 2)))
        return y, dx[:, low : low + size, low : low + size], dkernel

    names = 'output', 'gradient of its images', 'gradient of its kernel'
    return Check(name, names, inputs, compute, exact)


def matrix_product() -> Check:
    """A product and its gradients."""
    inputs = _whole(0, 64, 512), _whole(1, 512, 128), _whole(2, 64, 128)

    def compute(x, kernel, dy):
        y, pull = jax.vjp(jnp.matmul, x, kernel)
        return y, *pull(dy)

    def exact(x, kernel, dy):
        return x @ kernel, dy @ kernel.T, x.T @ dy

    names = 'output', 'gradient of its left factor', 'gradient of its right factor'
    return Check('matrix product', names, inputs, compute, exact)


def batch_normalization() -> Check:
    """In training, with the gradients."""
    axes = 0, 1, 2
    inputs = _whole(0, 8, 16, 16, 8) + 2, _whole(1, 8) + 5, _whole(2, 8), _whole(3, 8, 16, 16, 8)

    def compute(x, scale, bias, dy):
        def normalize(x, scale, bias):
            return batch_normalize(x, scale, bias, axes, EPSILON)

        (y, mean, var), pull = jax.vjp(normalize, x, scale, bias)
        return y, mean, var, *pull((dy, jnp.zeros_like(mean), jnp.zeros_like(var)))

    def exact(x, scale, bias, dy):
        mean, var = x.mean(axes), x.var(axes)
        rstd = 1 / np.sqrt(var + EPSILON)
        x = (x - mean) * rstd
        dbias, dscale = dy.sum(axes), (dy * x).sum(axes)
        dx = scale * rstd * (dy - dy.mean(axes) - x * (dy * x).mean(axes))
        return scale * x + bias, mean, var, dx, dscale, dbias

    names = 'output', 'mean', 'variance'
    names += tuple(f'gradient of its {what}' for what in ('images', 'scale', 'bias'))
    return Check('batch normalization', names, inputs, compute, exact)


def bfloat16_sums() -> Check:
    """Numbers in bfloat16 are added up in float32: bfloat16 itself cannot count past 256."""
    inputs = _whole(0, 4096, 8) + 4, _whole(1, 4096, 8) + 4

    def compute(x, kernel):
        x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
        return [result.astype(jnp.float32) for result in (x.sum(0), x.T @ kernel)]

    def exact(x, kernel):
        return x.sum(0), x.T @ kernel

    return Check('bfloat16', ('sum', 'matrix product'), inputs, compute, exact, BFLOAT16)


def dropout_mask() -> Check:
    """The key that follows from seed, stream and step, and the mask that follows from the key."""
    seed, count = np.array([7], np.uint32), 4096

    def compute(seed):
        key = rng.key(seed[0], 'dropout', 5)
        return jax.random.key_data(key), dropout(key, jnp.ones(count), 0.25)

    def exact(seed):
        key = np.concatenate([np.zeros_like(seed), seed])
        for number in (rng.STREAMS['dropout'], 5):
            key = np.concatenate(threefry(key, np.zeros_like(seed), np.full_like(seed, number)))
        positions = np.arange(count, dtype=np.uint32)
        bits, _ = threefry(key, np.zeros_like(positions), positions)
        return key, (bits < 0.75 * 2**32) / 0.75

    return Check('random numbers', ('key', 'dropout mask'), (seed,), compute, exact)


def moments() -> Check:
    """Mean and mean square of uniform numbers in [0, 1) and of standard normal ones."""

    def compute(seed):
        key, shape = jax.random.key(seed[0]), (2**20,)
        draws = jax.random.uniform(key, shape), jax.random.normal(key, shape)
        return [jnp.stack([x, x * x]).mean(1) for x in draws]

    def exact(seed):
        del seed
        return np.array([1 / 2, 1 / 3]), np.array([0, 1])

    names = 'moments of uniform ones', 'moments of normal ones'
    return Check('random numbers', names, (np.array([7], np.uint32),), compute, exact, MOMENTS)


def threefry(key: np.ndarray, high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 of 20 rounds in NumPy: two words for each counter (high, low), all uint32.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    a, b = high + keys[0], low + keys[1]
    for i in range(20):
        turn = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[i % 8])
        a = a + b
        b = a ^ (b << turn | b >> np.uint32(32) - turn)
        if i % 4 == 3:
            block = i // 4 + 1
            a, b = a + keys[block % 3], b + keys[(block + 1) % 3] + np.uint32(block)
    return a, b


def _whole(seed: int, *shape: int, most: int = 4) -> np.ndarray:
    """Whole numbers from −most to most, as float32."""
    draw = np.random.default_rng(seed)
    return draw.integers(-most, most + 1, shape).astype(np.float32)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if x.dtype == np.float32 else x


def _remedy() -> str:
    version, flags = runtime.jaxlib_version(), os.environ.get('XLA_FLAGS', '')
    wanted = runtime.CPU_FLAGS[0, 10][runtime.YNN_FLAG]
    if version.startswith('0.10.') and jax.default_backend() == 'cpu' and wanted not in flags:
        return f'set XLA_FLAGS={wanted}'
    other = f' or other flags than XLA_FLAGS={flags}' if flags else ''
    return f'use another jaxlib than {version}{other}'
