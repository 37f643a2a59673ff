"""Files in the user's cache folder that are whole or absent, whoever writes them at once.

Each file ends in the SHA-256 of what comes before: one that was cut off or altered is written
again. A file is built under another name, flushed to the disk, then renamed, so that readers and
other writers see the old one or the new one. Nothing is ever deleted from here but leftovers of
killed writers; the folder can be emptied at any time.
"""

import contextlib
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

SEAL = 32  # bytes of SHA-256
LEFTOVER_AGE = 24 * 3600  # seconds after which an unfinished file has no writer any more


def cached_array(
    path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None], dtype=np.uint8
) -> np.ndarray:
    """The array in `path`, memory-mapped and read-only; `fill`ed and stored first where it is not.

    Where the cache cannot be written, the array is built in memory, with a warning.
    """
    if is_whole(path):
        with contextlib.suppress(ValueError, OSError):  # whole, but no array: made again, too
            found = np.load(path, mmap_mode='r', allow_pickle=False)
            if found.shape == shape and found.dtype == dtype:
                return found
    try:
        with _replacing(path) as temporary:
            images = np.lib.format.open_memmap(temporary, 'w+', dtype, shape)
            _reserve(temporary)
            fill(images)
            images.flush()
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except OSError as error:
        warnings.warn(f'what was computed is kept in memory only: {error}', stacklevel=2)
        images = np.empty(shape, dtype)
        fill(images)
        return images


def read_bytes(path: Path) -> bytes | None:
    """What `write_bytes` stored, or None where the file is absent or damaged."""
    return path.read_bytes()[:-SEAL] if is_whole(path) else None


def write_bytes(path: Path, content: bytes) -> None:
    """Store `content`; where the cache cannot be written, warn and go on."""
    try:
        with _replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        warnings.warn(f'{path} cannot be written: {error}', stacklevel=2)


def is_whole(path: Path) -> bool:
    """Whether the file exists and its content agrees with the SHA-256 at its end."""
    try:
        whole = np.memmap(path, np.uint8, 'r')
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False
    return hashlib.sha256(whole[:-SEAL].data).digest() == whole[-SEAL:].tobytes()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which is sealed and takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'{path.name}.', suffix='.partial')
    temporary = Path(name)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, 'r+b') as file:
            seal = hashlib.file_digest(file, 'sha256').digest()
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    # A mapped file is sparse: on a full disk, writing to the map would kill the process.
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'r+b') as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _sweep(folder: Path) -> None:
    for leftover in folder.glob('*.partial'):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink()
