"""Files of a run that only grow, and whose content at any earlier moment can be checked."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


class Journal:
    """An append-only file.

    A position is its length and the SHA-256 of its bytes so far, as JSON. A checkpoint keeps the
    positions of its moment: what was written after it is cut off when the run goes on from it, and
    a file that no longer holds what it held then is found out.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._hash, self._length = hashlib.sha256(), 0

    def holds(self, position: dict[str, Any]) -> bool:
        """Whether the file begins with exactly the bytes it had at a position."""
        found, length = _digest(self.path, position['bytes'])
        return length == position['bytes'] and found.hexdigest() == position['sha256']

    def resume(self, position: dict[str, Any] | None) -> None:
        """Go on from a position, or from an empty file; what comes after it is cut off."""
        length = position['bytes'] if position else 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('ab') as file:
            file.truncate(length)
        self._hash, self._length = _digest(self.path, length)

    def append(self, data: bytes) -> None:
        """Write at the end."""
        with self.path.open('ab', buffering=0) as file:
            written = file.write(data)
            if written != len(data):  # the disk was filled by the first part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._hash.update(data)
        self._length += len(data)

    def position(self) -> dict[str, Any]:
        """Where the file ends now, once all of it is on the disk."""
        with self.path.open('rb') as file:
            os.fsync(file.fileno())
        return {'bytes': self._length, 'sha256': self._hash.hexdigest()}


def _digest(path: Path, length: int):
    """The hash of the first `length` bytes of a file, and how many of them there are."""
    found, left = hashlib.sha256(), length
    if path.exists():
        with path.open('rb') as file:
            while left and (data := file.read(min(left, CHUNK))):
                found.update(data)
                left -= len(data)
    return found, length - left
