"""Folders of IDX files, the format of MNIST and its successors, gzipped or not.

Format: http://yann.lecun.com/exdb/mnist: big-endian, two zero bytes, the type (8: uint8), the
number of dimensions, each dimension as uint32, then the values.
"""

import functools
import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnn_jax.data.source import Source, from_arrays
from cnn_jax.errors import UserError

PREFIXES = {'train': 'train', 'test': 't10k'}


def parts(folder: str) -> dict[str, Callable[[], Source]]:
    """The parts of a folder of MNIST-named files, `train` and, where it exists, `test`.

    Classes are the numbers from 0 to the largest training label.

    Errors:
        UserError: The folder or a file is missing; a file is damaged, cut off or of another
            type; images and labels differ in number.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f'{root} is not a folder; give the folder that holds the IDX files')
    if not _find(root, 'train', 'images', 3):
        raise UserError(f'{root} has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz')

    def part(name: str) -> Source:
        images = _read(root, PREFIXES[name], 'images', 3)
        labels = _read(root, PREFIXES[name], 'labels', 1)
        if len(images) != len(labels):
            raise UserError(
                f'{root} has {len(images)} {name} images but {len(labels)} {name} labels; '
                'fetch both files again'
            )
        known = labels if name == 'train' else _read(root, 'train', 'labels', 1)
        classes = tuple(str(k) for k in range(int(known.max(initial=0)) + 1))
        return from_arrays(f'idx:{folder} {name}', images[..., None], labels, classes)

    found = [name for name, prefix in PREFIXES.items() if _find(root, prefix, 'images', 3)]
    return {name: functools.partial(part, name) for name in found}


def _find(root: Path, prefix: str, what: str, dims: int) -> Path | None:
    for name in (f'{prefix}-{what}-idx{dims}-ubyte', f'{prefix}-{what}.idx{dims}-ubyte'):
        for path in (root / name, root / f'{name}.gz'):
            if path.is_file():
                return path
    return None


def _read(root: Path, prefix: str, what: str, dims: int) -> np.ndarray:
    path = _find(root, prefix, what, dims)
    if path is None:
        raise UserError(f'{root} has no {prefix}-{what}-idx{dims}-ubyte; add the file')
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f'{path} is not whole ({error}); fetch it again') from error
    if data[:4] != bytes([0, 0, 8, dims]):
        raise UserError(
            f'{path} is not an IDX file of {what}: it starts with {data[:4].hex(" ")}, '
            f'not 00 00 08 {dims:02x}'
        )
    header = 4 + 4 * dims
    shape = tuple(int.from_bytes(data[i : i + 4], 'big') for i in range(4, header, 4))
    if len(data) != header + math.prod(shape):
        raise UserError(
            f'{path} is not whole: it says {"×".join(map(str, shape))} values and has '
            f'{max(0, len(data) - header)}; fetch it again'
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
