"""What is known of a folder's files, kept in the cache so that only new ones are read again."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cnn_jax.data.decode import CorruptImage, read_file
from cnn_jax.data.parallel import parallel_map
from cnn_jax.data.scan import Finding, remember, remembered, scan
from cnn_jax.data.source import digest


class File(NamedTuple):
    """An image file: where it is, when it last changed, and what it contains."""

    path: str  # below the root, with slashes
    stamp: tuple[int, int, int]  # size, and times of the last change of content and of inode
    finding: Finding


def examined(root: Path, paths: Sequence[str]) -> dict[str, File]:
    """The given files, each with its `Finding`; `{path: File}` in the same order.

    A file is read when its stamp differs from the one in the index, as in git. One that could not
    be read at all is not indexed: what stood in the way may be gone the next time.
    """
    key = digest(os.fsencode(root.resolve()))
    rows = (File(path, tuple(stamp), Finding(*found)) for path, stamp, found in remembered(key))
    known = {file.path: file for file in rows}
    stamps = [_stamp(root / path) for path in paths]
    stale = [
        (path, stamp)
        for path, stamp in zip(paths, stamps)
        if path not in known or known[path].stamp != stamp
    ]
    read = parallel_map(lambda i: _examine(root, *stale[i]), len(stale), 'Examining images')
    known |= {file.path: file for file in read}
    if stale:
        remember(key, [known[path] for path in paths if known[path].finding.sha256])
    return {path: known[path] for path in paths}


def _examine(root: Path, path: str, stamp: tuple[int, int, int]) -> File:
    try:
        return File(path, stamp, scan(read_file(root / path)))
    except (OSError, CorruptImage) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        return File(path, stamp, Finding(0, 0, 0, reason, ''))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # a link to nowhere, which `_examine` reports
        return 0, 0, 0
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
