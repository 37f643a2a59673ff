"""What VGG16's parameters are: names, shapes, canonical order and digest."""

import hashlib
from collections.abc import Mapping

import numpy as np

from cnn_jax.params import flatten

Params = Mapping[str, Mapping[str, np.ndarray]]

# (block, filters, convolutions): configuration D of Simonyan and Zisserman, Table 1.
BLOCKS = (
    ('block1', 64, 2),
    ('block2', 128, 2),
    ('block3', 256, 3),
    ('block4', 512, 3),
    ('block5', 512, 3),
)


def _convolutions() -> dict[str, tuple[int, ...]]:
    shapes, channels = {}, 3
    for block, filters, count in BLOCKS:
        for i in range(1, count + 1):
            shapes[f'{block}_conv{i}'] = (3, 3, channels, filters)
            channels = filters
    return shapes


# Kernel shapes in the order of the layers: HWIO, and (inputs, outputs) for the top.
CONVOLUTIONS = _convolutions()
TOP = {'fc1': (7 * 7 * 512, 4096), 'fc2': (4096, 4096), 'predictions': (4096, 1000)}


def shapes(include_top: bool = False) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape in canonical order, `{'block1_conv1/kernel': (3, 3, 3, 64), …}`."""
    found = {}
    for layer, kernel in (CONVOLUTIONS | (TOP if include_top else {})).items():
        found |= {f'{layer}/kernel': kernel, f'{layer}/bias': kernel[-1:]}
    return found


def digest(params: Params) -> str:
    """SHA-256 of the parameters' bytes: equal weights, equal digest, whatever file held them.

    The bytes are each layer's kernel, then its bias, layers in order, float32 little-endian,
    row-major (HWIO for a convolution, (inputs, outputs) for a fully connected layer).

    Args:
        params: `{'block1_conv1': {'kernel', 'bias'}, …}`, with or without the top.

    Returns:
        64 hexadecimal digits.
    """
    sha256 = hashlib.sha256()
    flat = flatten(params)
    for name in shapes(include_top=True):
        if name in flat:
            sha256.update(np.ascontiguousarray(flat[name], '<f4').data)
    return sha256.hexdigest()
