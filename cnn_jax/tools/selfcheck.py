"""A self-check at start-up: does this machine compute correctly what training relies on?

Most inputs are whole numbers that TF32 and bfloat16 hold, with sums that float32 holds: on any
device, in its default precision, the results are exact or a few roundings of float32 away.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import rng, runtime
from cnn_jax.errors import UserError
from cnn_jax.nn import conv2d, dropout
from cnn_jax.nn.native import check

TOLERANCE = 1e-5  # of the largest error, relative to the largest number of the correct result
TOLERANCES = {'bfloat16 sum': 2.0**-8, 'moments of normal numbers': 5e-3}  # 5 standard errors

# A form that `nn.conv2d` computes in its own way each: image size, channels, stride.
CONVOLUTIONS = {
    'convolution': (32, 8, 1),
    'convolution with stride 2': (32, 8, 2),
    'convolution of grey images': (32, 1, 1),
    'convolution of images smaller than its kernel': (2, 8, 1),
}

# By an implementation of Threefry-2x32 of its own in NumPy (Salmon et al. 2011, "Parallel random
# numbers: as easy as 1, 2, 3"): the key of seed 7 at step 5, and what dropout keeps of 128 units.
KEY = (1707138131, 469344758)
MASK = '7cefcbdf253bed7feddf7eac4bef6ff7'

Results = dict[str, Any]


def self_check() -> None:
    """Start JAX; compare reductions, convolutions, gradients, random numbers with NumPy's."""
    runtime.start_jax()
    given = inputs()
    # As arguments: XLA folds constants while it compiles, by other code than at run time.
    compare(jax.device_get(jax.jit(compute)(given)), exact(given))


def compare(results: Results, correct: Results) -> None:
    """Raise a `UserError` for the first result that is wrong, or NaN."""
    for name, right in correct.items():
        difference = np.subtract(results[name], right, dtype=np.float64)
        error = np.max(abs(difference)) / np.max(abs(right))
        if not error <= TOLERANCES.get(name, TOLERANCE):
            raise UserError(
                f'XLA computes wrong results on this machine ({name}: off by {100 * error:.2g}% of '
                f'its largest value); {_remedy()}'
            )


def inputs() -> dict[str, Any]:
    """The arguments of `compute` and `exact`."""
    table = _integers(32769, 3, most=255)
    table[-1] = 256  # each maximum is where a loop has its last, partial round
    given: dict[str, Any] = {'table': table, 'matrix': np.eye(3, dtype=np.float32)}
    given |= {'seed': np.uint32(7), 'few': _integers(4096, 8) + 4}
    for name, (size, channels, stride) in CONVOLUTIONS.items():
        out = -(-size // stride)
        shapes = (4, size, size, channels), (3, 3, channels, 16), (4, out, out, 16)
        given[name] = tuple(_integers(*shape) for shape in shapes)
    return given


def compute(given: dict[str, Any]) -> Results:
    """The checked results, by JAX."""
    table, matrix, few = given['table'], given['matrix'], given['few'].astype(jnp.bfloat16)
    key = rng.key(given['seed'], 'dropout', 5)
    normal = jax.random.normal(jax.random.key(given['seed']), (2**20,))
    results = {  # the first as in jax issue 39103
        'sum of squares': jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(table),
        'sum': table.sum(0),
        'sum of each row': table.sum(1),
        'mean of long rows': table.T.mean(1),
        'maximum': table.max(0),
        'matrix product': given['few'].T @ given['few'],
        'bfloat16 sum': few.sum(0).astype(jnp.float32),
        'random key': jax.random.key_data(key),
        'dropout': dropout(key, jnp.ones(128), 0.25),
        'moments of normal numbers': jnp.stack([normal, normal**2]).mean(1),
    }
    for name, (_, _, stride) in CONVOLUTIONS.items():
        x, kernel, dy = given[name]
        y, pull = jax.vjp(functools.partial(conv2d, stride=stride), x, kernel)
        results |= dict(zip(_parts(name), (y, *pull(dy))))
    return results


def exact(given: dict[str, Any]) -> Results:
    """The correct results, by NumPy in float64."""
    table, few = given['table'].astype(np.float64), given['few'].astype(np.float64)
    kept = np.unpackbits(np.frombuffer(bytes.fromhex(MASK), np.uint8))
    results = {
        'sum of squares': (table**2).sum(1),
        'sum': table.sum(0),
        'sum of each row': table.sum(1),
        'mean of long rows': table.mean(0),
        'maximum': table.max(0),
        'matrix product': few.T @ few,
        'bfloat16 sum': few.sum(0),
        'random key': np.array(KEY),
        'dropout': kept / 0.75,
        'moments of normal numbers': np.array([0, 1]),
    }
    for name, (size, _, stride) in CONVOLUTIONS.items():
        x, kernel, dy = given[name]
        total = (dy.shape[1] - 1) * stride + 3 - size
        padding = (total // 2, total - total // 2) * 2
        case = *x.shape, 3, 3, kernel.shape[-1], (stride, stride), padding, (1, 1), 1
        results |= dict(zip(_parts(name), check.exact(check.geometry(case), x, kernel, dy)))
    return results


def _parts(name: str) -> list[str]:
    return [name, f'gradient of the images of a {name}', f'gradient of the kernel of a {name}']


def _integers(*shape: int, most: int = 4) -> np.ndarray:
    """Whole numbers from −most to most, as float32."""
    draw = np.random.default_rng(sum(shape))
    return draw.integers(-most, most + 1, shape).astype(np.float32)


def _remedy() -> str:
    version, flags = runtime.jaxlib_version(), os.environ.get('XLA_FLAGS', '')
    wanted = runtime.CPU_FLAGS[0, 10][runtime.YNN_FLAG]
    if version.startswith('0.10.') and jax.default_backend() == 'cpu' and wanted not in flags:
        return f'set XLA_FLAGS={wanted}'
    other = f' or other flags than XLA_FLAGS={flags}' if flags else ''
    return f'use another jaxlib than {version}{other}'
