"""Rows of one shape by key, kept in a folder that grows: the feature cache's files.

A pair of files holds some hundred rows and is never changed: `NAME.keys`, whose NAME is a digest of
its content, and `NAME.npy`, which ends in its own. So several processes may write at once, a kill
loses what one file would have held, and a damaged file is found and removed. Files that are not
full are joined when rows are added: a million rows are some thousand files, however they came.
"""

import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from tqdm import tqdm

from cnn_jax.errors import UserError
from cnn_jax.files import (
    Corrupt,
    cached_array,
    digest,
    make_folder,
    read_bytes,
    stored_array,
    write_bytes,
    write_text,
)

KEY_BYTES = 32
ABOUT = 'about.txt'
LIMIT = 'CNN_JAX_CACHE_GB'
Fill = Callable[[Int[np.ndarray, ' k'], np.ndarray], object]  # positions, the rows to write


@dataclass(frozen=True)
class Rows:
    """Rows that lie in several arrays: `rows[positions]` is an array of them."""

    parts: list[np.ndarray]
    places: Int[np.ndarray, 'n 2']  # part, and row of the part

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, positions: Int[np.ndarray, ' k']) -> Shaped[np.ndarray, 'k ...']:
        return np.stack([self.parts[part][row] for part, row in self.places[positions].tolist()])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.parts[0].shape[1:]

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return len(self) * self.parts[0][:1].nbytes


class Entry(NamedTuple):
    """What is known of a store's folder without opening it."""

    folder: Path
    about: str
    rows: int
    nbytes: int
    used: float  # the time of the last use, in seconds since 1970


@dataclass(frozen=True)
class Store:
    """The rows in a folder, at most `per_file` in a file; `about` says what they are, in a line."""

    folder: Path
    shape: tuple[int, ...]
    dtype: Any
    per_file: int
    about: str = ''

    def rows(
        self, keys: Sequence[bytes], fill: Fill, label: str = '', share: tuple[int, int] = (0, 1)
    ) -> Rows:
        """Return the rows of `keys`; those that are missing are computed by `fill` and kept.

        Args:
            keys: 32 bytes each, of which equal ones stand for equal rows.
            fill: Computes the rows at some positions of `keys` into an array of as many.
            label: What the progress bar says.
            share: The number of this process and of all that begin at once: each starts elsewhere.
        """
        count, (own, shares), most = len(keys), share, limit()
        missing: dict[bytes, int] = {}  # position by key, in the order of computing
        for i in [*range(count * own // shares, count), *range(count * own // shares)]:
            missing.setdefault(keys[i], i)
        parts: list[np.ndarray] = []
        found: dict[bytes, tuple[int, int]] = {}
        seen: set[Path] = set()
        computed = False

        def take(array: np.ndarray, inside: Sequence[bytes]) -> None:
            for row, key in enumerate(inside):
                if missing.pop(key, None) is not None:
                    found[key] = len(parts), row
            parts.append(array)

        _use(self.folder, self.about)
        bar = tqdm(total=len(missing), desc=label, leave=False, disable=None)
        with contextlib.closing(bar):
            while missing:
                new = sorted({*self.folder.glob('*.keys')} - seen)
                seen.update(new)
                for path in new:
                    inside = _keys_in(path)
                    if not missing.keys().isdisjoint(inside):
                        rows = self._open(path, len(inside))
                        if rows is not None:
                            take(rows, inside)
                if missing and not new:  # nor has another process added any meanwhile
                    bar.update(len(found) - bar.n)
                    chosen = [*itertools.islice(missing.values(), self.per_file)]
                    computed = True
                    own_keys = [keys[i] for i in chosen]
                    take(self._add(own_keys, np.array(chosen), fill), own_keys)
        if computed:
            remove_oldest(self.folder.parent, most)
        return Rows(parts, np.array([found[key] for key in keys], np.int64).reshape(-1, 2))

    def _open(self, path: Path, count: int) -> np.ndarray | None:
        """The rows that belong to a file of keys; None, and both files are gone, if damaged."""
        array = stored_array(path.with_suffix('.npy'), (count, *self.shape), self.dtype)
        if array is None:
            _remove(path)
        return array

    def _add(self, keys: list[bytes], positions: np.ndarray, fill: Fill) -> np.ndarray:
        """Compute rows, and write them."""
        content = b''.join(keys)
        path = self.folder / f'{digest(content)}.keys'
        rows = path.with_suffix('.npy')
        shape = len(keys), *self.shape
        array = cached_array(rows, shape, lambda out: fill(positions, out), self.dtype)
        with contextlib.suppress(OSError):  # of which there was a warning
            if rows.exists():
                write_bytes(path, content)
        return array


def entries(root: Path) -> list[Entry]:
    """The stores in a folder, the one that was used last first."""
    found = []
    for folder in root.glob('*'):
        with contextlib.suppress(OSError):  # another process has just removed it
            sizes = {path: path.stat().st_size for path in folder.iterdir()}
            rows = sum(size // KEY_BYTES for path, size in sizes.items() if path.suffix == '.keys')
            about = folder / ABOUT
            text = about.read_text('utf-8', 'replace') if about in sizes else 'of another version'
            found.append(Entry(folder, text, rows, sum(sizes.values()), folder.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def limit() -> float:
    """The bytes that all stores may take together: CNN_JAX_CACHE_GB, else 20 GB."""
    given = os.environ.get(LIMIT) or '20'
    try:
        return float(given) * 1e9
    except ValueError:
        raise UserError(f'{LIMIT} is {given!r}; set it to a number of gigabytes') from None


def remove_oldest(root: Path, most: float) -> list[Path]:
    """Remove stores that no process uses, from the one unused for longest, down to `most` bytes."""
    known = entries(root)
    total, removed = sum(entry.nbytes for entry in known), []
    for entry in reversed(known):
        if total <= most:
            break
        with contextlib.suppress(OSError), _locked(entry.folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            gone = entry.folder.rename(root / f'.{secrets.token_hex(8)}')
            shutil.rmtree(gone, ignore_errors=True)
            total -= entry.nbytes
            removed.append(entry.folder)
    return removed


_used: dict[Path, int] = {}  # descriptors whose locks keep a store from being removed


def _use(folder: Path, about: str) -> None:
    """Keep a store from being removed while this process lives, and note the time."""
    with contextlib.suppress(OSError):  # where nothing can be written or locked
        while folder not in _used or not folder.exists():
            if folder in _used:
                os.close(_used.pop(folder))
            make_folder(folder)
            with _locked(folder, fcntl.LOCK_SH) as descriptor:
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    _used[folder] = os.dup(descriptor)
        if not (folder / ABOUT).exists():
            write_text(folder / ABOUT, about)
        os.utime(folder)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


def _keys_in(path: Path) -> list[bytes]:
    """The keys in a file that is what its name says, else none."""
    with contextlib.suppress(OSError, Corrupt):
        content = read_bytes(path)
        if path.stem == digest(content):
            return [content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES)]
    return []


def _remove(path: Path) -> None:
    """Remove a file of keys and its rows."""
    for file in (path, path.with_suffix('.npy')):
        with contextlib.suppress(OSError):
            file.unlink()
