"""What a weights file holds, before any of it is believed."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cnn_jax.errors import UserError
from cnn_jax.params import unflatten
from cnn_jax.pretrained.layout import Params, shapes

# Layers with these names are a VGG backbone's: one that VGG16 lacks is another network's.
BACKBONE = re.compile(r'(block\d+_conv\d+|features\.\d+)\b')


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: shape and type as the file states them, values read on demand."""

    shape: tuple[int, ...]  # canonical: HWIO, or (inputs, outputs)
    dtype: str  # NumPy's name
    read: Callable[[], np.ndarray]  # of that shape


@dataclass(frozen=True)
class Contents:
    """The tensors of a file.

    Attributes:
        tensors: by canonical name (`block1_conv1/kernel`) where there is one, else by their own.
        layout: whose names the file uses: 'keras', 'torch', 'cnn_jax' or '' when it has none.
        metadata: what the file says of itself.
    """

    tensors: Mapping[str, Stored]
    layout: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def add(tensors: dict[str, Stored], name: str, stored: Stored, path: Path) -> None:
    """Put a tensor among those of the file `path`; a second of its name is a `UserError`."""
    if name in tensors:
        raise UserError(f'{path} holds {name} twice; save VGG16 alone')
    tensors[name] = stored


def collect(contents: Contents, path: Path, include_top: bool) -> tuple[Params, tuple[str, ...]]:
    """The parameters of VGG16, every one checked, and the names of tensors outside of it.

    Args:
        contents: an open file's.
        path: of the file, for messages.
        include_top: also the three fully connected layers.

    Returns:
        `({'block1_conv1': {'kernel', 'bias'}, …}, names)`: float32, row-major, read-only arrays,
        and what was left alone, such as the head of a classifier.

    Errors:
        UserError: a tensor is missing, foreign to VGG16, of another shape or type, or not finite.
    """
    expected = shapes(include_top)
    known = shapes(include_top=True)
    problems = _mismatches(contents.tensors, expected, known)
    if problems:
        raise UserError(
            f'{path} does not hold VGG16{" with its top" if include_top else ""}: '
            f'{"; ".join(problems)}; give a file of this network'
        )
    read = {name: _float32(contents.tensors[name].read()) for name in expected}
    if unusable := [name for name, array in read.items() if not np.isfinite(array).all()]:
        raise UserError(
            f'{path} holds values that are not finite in {", ".join(unusable)}; '
            'give a file whose training did not diverge'
        )
    return unflatten(read), tuple(name for name in contents.tensors if name not in expected)


def _mismatches(tensors: Mapping[str, Stored], expected: dict, known: dict) -> list[str]:
    problems = [f'{name} is missing' for name in expected if name not in tensors]
    problems += [
        f'{name} is not part of it'
        for name in tensors
        if name not in known and BACKBONE.match(name)
    ]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        stored = tensors[name]
        if stored.shape != shape:
            problems.append(f'{name} is {list(stored.shape)} instead of {list(shape)}')
        if stored.dtype not in ('float16', 'float32'):
            problems.append(f'{name} is {stored.dtype} instead of float32')
    return problems


def _float32(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array, np.float32)
    array.flags.writeable = False
    return array
