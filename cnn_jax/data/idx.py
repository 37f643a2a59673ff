"""Folders of IDX files, the format of MNIST and its successors, gzipped or not.

Format: http://yann.lecun.com/exdb/mnist: big-endian, two zero bytes, the type (8: uint8), the
number of dimensions, each dimension as uint32, then the values.
"""

import functools
import gzip
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from cnn_jax.data.decode import MAX_PIXELS
from cnn_jax.data.source import Source, from_arrays
from cnn_jax.errors import UserError

PREFIXES = {'train': 'train', 'test': 't10k'}
# Deflate makes at most 1,032 bytes of one. Of sets beyond 1 GiB, photographs stay far below 100.
PACKED, LARGE, PACKED_LARGE = 1032, 1 << 30, 100


def parts(folder: str) -> dict[str, Callable[[], Source]]:
    """The parts of a folder of MNIST-named files, `train` and, where it exists, `test`.

    Classes are the numbers from 0 to the largest training label.

    Errors:
        UserError: The folder or a file is missing; a file is damaged, cut off or of another
            type; images and labels differ in number.
    """
    root = Path(os.path.expanduser(folder))
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
    try:
        with open(path, 'rb') as file:
            gzipped = file.read(2) == b'\x1f\x8b'
            file.seek(0)
            return _array(path, gzip.open(file) if gzipped else file, what, dims, gzipped)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f'{path} is not whole ({error}); fetch it again') from error


def _array(
    path: Path, file: IO[bytes] | gzip.GzipFile, what: str, dims: int, gzipped: bool
) -> np.ndarray:
    """The values in an open file; a header that lies about their number costs no memory."""
    head = file.read(4 + 4 * dims)
    if head[:4] != bytes([0, 0, 8, dims]):
        raise UserError(
            f'{path} is not an IDX file of {what}: it starts with {head[:4].hex(" ")}, '
            f'not 00 00 08 {dims:02x}'
        )
    if len(head) < 4 + 4 * dims:
        raise EOFError('the header is cut off')
    shape = tuple(int.from_bytes(head[i : i + 4], 'big') for i in range(4, 4 + 4 * dims, 4))
    count, size = math.prod(shape), path.stat().st_size
    says = f'it says {"×".join(map(str, shape))} values'
    if 0 in shape or math.prod(shape[1:]) > MAX_PIXELS:
        raise UserError(f'{path} has no {what} of a usable size: {says}; fetch it again')
    if count > (min(PACKED * size, max(LARGE, PACKED_LARGE * size)) if gzipped else size):
        raise UserError(
            f'{path} is not read: {says} in {size:,} bytes; fetch it again or unpack it'
        )
    values = file.read(count + 1)
    if len(values) != count:
        has = len(values) if len(values) < count else 'more'
        raise UserError(f'{path} is not whole: {says} and has {has}; fetch it again')
    return np.frombuffer(values, np.uint8).reshape(shape)
