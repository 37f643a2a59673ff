"""Folders of image files: one sub-folder a class, or the same under train/ and test/."""

import functools
import hashlib
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn_jax.data import decode
from cnn_jax.data.decode import (
    CorruptImage,
    Finding,
    load_findings,
    parallel_map,
    read_file,
    scan,
    skipped,
    store_findings,
)
from cnn_jax.data.source import Source, digest
from cnn_jax.errors import UserError


class File(NamedTuple):
    """An image file: its path, the stamp of its last change, and its content."""

    path: str  # below the root, with slashes
    stamp: tuple[int, int, int]  # size, and times of the last change of content and of inode
    finding: Finding


def examine_files(root: Path, paths: Sequence[str]) -> dict[str, File]:
    """The given files, each with its `Finding`; `{path: File}` in the same order.

    The findings are kept in an index in the cache. A file is read when its stamp differs from the
    one there, as in git. One that could not be read at all is not indexed: the obstacle may be gone
    the next time.
    """
    key = digest(os.fsencode(root.resolve()))
    rows = (File(path, tuple(stamp), Finding(*row)) for path, stamp, row in load_findings(key))
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
        store_findings(key, [known[path] for path in paths if known[path].finding.sha256])
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


UNPRINTABLE = ('Cc', 'Cs')  # control characters, and bytes that are not UTF-8
PARTS = {
    'train': 'train',
    'test': 'test',
    **dict.fromkeys(('val', 'valid', 'validation'), 'validation'),
}
LIKE_PARTS = {*PARTS, 'training', 'testing', 'tests'}
Listing = list[tuple[str, int]]  # path below the root, with slashes, and label


def parts(folder: str, max_corrupt: float) -> dict[str, Callable[[], Source]]:
    """The parts of a folder: `all`, or those of train/, test/ and validation/ (val/, valid/).

    Class names are the sub-folders' names, sorted; images lie below them at any depth. Hidden files
    and files without the suffix of an image are left out.

    A part, a class or an image may be a link, also to elsewhere. Below a class, links to folders
    are not followed, so that none leads round in a circle.

    Args:
        folder: The path; ~ is the home folder.
        max_corrupt: The largest fraction of images, over all parts, that may be unreadable.

    Errors:
        UserError: The folder is missing, has no sub-folders or cannot be listed; parts are named
            otherwise, or mixed with classes; a class has no images or no printable name,
            train/ lacks it, or it is a link to a folder above itself; more than `max_corrupt` of
            the images cannot be read.
    """
    root, name = Path(os.path.expanduser(folder)), f'folder:{folder}'
    if not os.path.isdir(root):
        raise UserError(f'{root} is not a folder; give one that holds a sub-folder for each class')
    try:
        layout = _layout(root)
        class_names = _class_names(layout)
        listings = {part: _listing(root, below, class_names) for part, below in layout.items()}
    except OSError as error:  # else its images would be missing without a word
        raise UserError(
            f'{error.filename} cannot be listed: {error.strerror}; make it readable or remove it'
        ) from error
    # All parts are read for any of them: that the images are grey or RGB is decided by all.
    files = examine_files(root, [path for listing in listings.values() for path, _ in listing])
    skipped(name, list(files), [file.finding for file in files.values()], max_corrupt)
    channels = max(file.finding.channels for file in files.values())

    def open_part(part: str) -> Source:
        part_name = name if part == 'all' else f'{name} {part}'
        labelled = [(files[path], label) for path, label in listings[part]]
        return _source(part_name, root, labelled, class_names, channels)

    return {part: functools.partial(open_part, part) for part in layout}


def _layout(root: Path) -> dict[str, Path]:
    """The folder that holds the class folders of each part."""
    below = _sub_folders(root)
    if not below:
        raise UserError(f'{root} has no sub-folders; sort the images into one for each class')
    if 'train' not in below or not _sub_folders(root / 'train'):
        if all(name.lower() in LIKE_PARTS for name in below):
            raise UserError(
                f'the sub-folders of {root} are {", ".join(below)}, which look like parts and not '
                f'like classes; name the parts {", ".join(PARTS)}, with the classes in them'
            )
        return {'all': root}
    if others := [name for name in below if name not in PARTS]:
        raise UserError(
            f'{root} has train/ and {others[0]}/, which is no part; name the parts '
            f'{", ".join(PARTS)}, and move what does not belong to the images'
        )
    layout = {}
    for folder, part in PARTS.items():
        if folder in below:
            if part in layout:
                raise UserError(
                    f'{root} has both {layout[part].name} and {folder}; remove or rename one'
                )
            layout[part] = root / folder
    return layout


def _class_names(layout: dict[str, Path]) -> tuple[str, ...]:
    base = layout.get('train') or layout['all']
    class_names = tuple(_sub_folders(base))
    for name in class_names:
        if any(unicodedata.category(c) in UNPRINTABLE for c in name):
            raise UserError(
                f'the folder {str(base / name)!r} gives a class its name, which cannot be printed: '
                'rename it without control characters, in UTF-8'
            )
    for below in layout.values():
        for other in _sub_folders(below):
            if other not in class_names:
                raise UserError(f'{below / other} is a class that {base} lacks; add or remove it')
    return class_names


def _listing(root: Path, below: Path, class_names: tuple[str, ...]) -> Listing:
    listing = []
    for label, class_name in enumerate(class_names):
        folder = below / class_name
        if not os.path.isdir(folder):  # a class that this part has no images of
            continue
        if below.resolve().is_relative_to(folder.resolve()):
            raise UserError(f'{folder} is a link to a folder above itself; remove the link')
        images = _image_files(folder)
        if not images:
            raise UserError(
                f'{folder} holds no images ({", ".join(decode.SUFFIXES)}); '
                'add some or remove the folder'
            )
        listing += [(path.relative_to(root).as_posix(), label) for path in images]
    return listing


def _image_files(folder: Path) -> list[Path]:
    files = [
        Path(below, file)
        for below, _, files in os.walk(folder, onerror=_fail)
        for file in files
        if file.lower().endswith(decode.SUFFIXES)
    ]
    hidden = len(folder.parts)
    visible = [f for f in files if not any(p.startswith('.') for p in f.parts[hidden:])]
    return sorted(visible, key=lambda path: path.as_posix())


def _fail(error: OSError) -> None:
    raise error


def _sub_folders(folder: Path) -> list[str]:
    names = [name for name in os.listdir(folder) if not name.startswith('.')]
    return sorted(name for name in names if os.path.isdir(folder / name))


def _source(
    name: str,
    root: Path,
    labelled: list[tuple[File, int]],
    class_names: tuple[str, ...],
    channels: int,
) -> Source:
    readable = [(file, label) for file, label in labelled if not file.finding.reason]
    for label in sorted({k for _, k in labelled} - {k for _, k in readable}):
        raise UserError(f'{name} has no readable image of class {class_names[label]}; add some')
    files = [file for file, _ in readable]

    def read(i: int) -> np.ndarray:
        path = root / files[i].path
        try:
            data = read_file(path)
            if hashlib.sha256(data).hexdigest() != files[i].finding.sha256:
                raise CorruptImage('it holds other bytes')
            return decode.with_channels(decode.decode(data), channels)
        except (OSError, CorruptImage) as error:
            reason = getattr(error, 'strerror', None) or error
            raise UserError(
                f'{path} has changed since the run began ({reason}); leave the images alone while '
                'a run uses them, and start it again'
            ) from error

    return Source(
        name=name,
        class_names=class_names,
        labels=np.array([label for _, label in readable], np.int32),
        sizes=np.array([file.finding[:2] for file in files], np.int32).reshape(-1, 2),
        channels=channels,
        read=read,
        describe=lambda i: str(root / files[i].path),
        fingerprint=digest(*class_names, *(p for f in files for p in (f.path, f.finding.sha256))),
        encoded=True,
        skipped=tuple((f.path, f.finding.reason) for f, _ in labelled if f.finding.reason),
    )
