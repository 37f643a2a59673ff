"""Folders of image files: one sub-folder a class, or the same under train/ and test/."""

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cnn_jax.data import decode
from cnn_jax.data.decode import CorruptImage, Finding
from cnn_jax.data.source import Source, count_left_out, digest
from cnn_jax.errors import UserError, reason_of
from cnn_jax.files import local_path


def examine_files(root: Path, paths: Sequence[str], *lists: str) -> dict[str, Finding]:
    """The `Finding` of each file, by its path below the root (or absolute), in the same order.

    An index in the cache, of the root or of a list of files there, keeps them: a file is read when
    its stamp differs. One that could not be read at all is not indexed, but tried again.
    """
    key = digest(os.fsencode(root.resolve()), *lists)
    known = {path: (tuple(stamp), Finding(*row)) for path, stamp, row in decode.load_findings(key)}
    stamps = {path: _stamp(root / path) for path in paths}
    stale = [path for path in paths if path not in known or known[path][0] != stamps[path]]
    read = decode.parallel_map(lambda i: _examine(root / stale[i]), len(stale), 'Examining images')
    known |= {path: (stamps[path], finding) for path, finding in zip(stale, read)}
    if stale:
        decode.store_findings(
            key, [(path, *known[path]) for path in paths if known[path][1].sha256]
        )
    return {path: known[path][1] for path in paths}


def _examine(path: Path) -> Finding:
    try:
        return decode.scan(decode.read_file(path))
    except (OSError, CorruptImage) as error:
        return Finding(0, 0, 0, reason_of(error), '')


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size, and times of the last change of content and of inode."""
    try:
        stat = os.stat(path)
    except OSError:  # a link to nowhere, which `_examine` reports
        return 0, 0, 0
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


UNPRINTABLE = ('Cc', 'Cs')  # control characters, and bytes that are not UTF-8
PARTS = {'train': 'train', 'test': 'test'}
PARTS |= dict.fromkeys(('val', 'valid', 'validation', 'dev'), 'validation')
LIKE_PARTS = {*PARTS, 'training', 'testing', 'tests'}
COMPANIONS = ('@eaDir', '__MACOSX', '#recycle', '$RECYCLE.BIN')  # of file servers and systems
Listing = dict[str, int]  # path below the root, with slashes, and label
LeftOut = list[tuple[str, str]]  # path, and kind of file
NO_CLASS = 'in no class folder'


def parts(folder: str, max_corrupt: float) -> dict[str, Callable[[], Source]]:
    """The parts of a folder: `all`, or those of train/, test/ and validation/ (val/, valid/, dev/).

    Class names are the sub-folders' names in the Unicode form NFC, sorted; folders whose names
    differ in their form alone are one class. Images lie below them at any depth, not behind links
    to folders. What else is there is left out and listed: other endings, hidden files, thumbnails,
    images in no class.

    Args:
        folder: The path; ~ is the home folder.
        max_corrupt: The largest fraction of images, over all parts, that may be unreadable.

    Errors:
        UserError: The folder is missing or not arranged like this, or a class has no images to
            train on; more than `max_corrupt` of the images cannot be read.
    """
    root, name = Path(local_path(folder, 'config.data.source')), f'folder:{folder}'
    if not os.path.isdir(root):
        raise UserError(f'{root} is not a folder; give one that holds a sub-folder for each class')
    try:
        layout = _layout(root)
        class_names = _class_names(layout)
        folders = [below.name for below in layout.values()]
        found = _aside(root, folders) if 'train' in layout else []
        listings = {}
        for part, below in layout.items():
            listings[part], others = _list_part(root, part, below, class_names)
            found += others
    except OSError as error:  # else its images would be missing without a word
        raise UserError(
            f'{error.filename} cannot be listed: {error.strerror}; make it readable or remove it'
        ) from error
    left_out = [(Path(path).relative_to(root).as_posix(), kind) for path, kind in found]
    # All parts are read for any of them: that the images are grey or RGB is decided by all.
    files = examine_files(root, [path for listing in listings.values() for path in listing])
    unreadable = decode.skipped(name, list(files), list(files.values()), max_corrupt)

    def open_part(part: str) -> Source:
        loose = [path for path, kind in left_out if kind == NO_CLASS]
        if not listings[part] and any((root / path).parent == layout[part] for path in loose):
            raise UserError(
                f'the images in {layout[part]} are {NO_CLASS}; classify them with launch.predict, '
                "and set --config.data.train='train[:80%]' --config.data.eval='train[80%:]'"
            )
        own = listings[part]
        left = [*(row for row in unreadable if row[0] in own), *left_out]
        part_name = name if part == 'all' else f'{name} {part}'
        return source_of(part_name, root, own, files, class_names, left)

    return {part: functools.partial(open_part, part) for part in layout}


def find_images(folder: Path, without: Sequence[str] = ()) -> tuple[list[Path], LeftOut]:
    """Find the image files at any depth below a folder; links to folders are not followed.

    Returns:
        The paths of the images, sorted, and those of other files, each with its kind as
        `count_left_out` counts it; nothing of the sub-folders `without`.
    """
    images, left_out = [], []

    def fail(error: OSError) -> None:
        raise error

    for below, folders, files in os.walk(folder, onerror=fail):
        if below == os.fspath(folder):
            folders[:] = [name for name in folders if name not in without]
        inside = Path(below).relative_to(folder).parts
        links = [name for name in folders if os.path.islink(os.path.join(below, name))]
        left_out += [(os.path.join(below, name), 'behind a link to a folder') for name in links]
        for name in files:
            if kind := _kind((*inside, name)):
                left_out.append((os.path.join(below, name), kind))
            else:
                images.append(Path(below, name))
    return sorted(images, key=lambda path: path.as_posix()), sorted(left_out)


def _kind(parts: Sequence[str]) -> str:
    """The kind of a file that is left out, by its path below a folder; '' of an image."""
    if companion := next(filter(None, map(_companion, parts)), ''):
        return companion
    ending = os.path.splitext(parts[-1])[1].lower()
    if ending in decode.SUFFIXES:
        return ''
    if ending in decode.HEIC:
        return decode.NO_HEIF
    if not ending:
        return 'without an ending'
    return ending if re.fullmatch(r'\.\w{1,10}', ending) else 'of other endings'


def _companion(name: str) -> str:
    """The kind of a file or folder that a system keeps beside photographs; '' of another."""
    if name in COMPANIONS:
        return f'in {name}'
    return 'hidden' if name.startswith('.') else ''


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
            f'{root} has train/ and {others[0]}/, which is not a part; name the parts '
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
    class_names = tuple(_class_folders(base))
    for name in class_names:
        check_class_name(name, f'the folder {str(base / name)!r}')
    for below in layout.values():
        for other in _class_folders(below):
            if other not in class_names:
                raise UserError(f'{below / other} is a class that {base} lacks; add or remove it')
    return class_names


def check_class_name(name: str, origin: str) -> None:
    """Refuse the name of a class that cannot be printed, by its origin, such as a folder."""
    if any(unicodedata.category(c) in UNPRINTABLE for c in name):
        raise UserError(
            f'{origin} gives a class its name, which cannot be printed: rename it without control '
            'characters, in UTF-8'
        )


def _class_folders(below: Path) -> dict[str, list[str]]:
    """The folders of each class of a part, by the class's name."""
    classes: dict[str, list[str]] = {}
    for name in _sub_folders(below):
        classes.setdefault(unicodedata.normalize('NFC', name), []).append(name)
    return dict(sorted(classes.items()))


def _list_part(
    root: Path, part: str, below: Path, class_names: tuple[str, ...]
) -> tuple[Listing, LeftOut]:
    """The images of a part with their labels, and what is left out."""
    folders, listing = _class_folders(below), {}
    left_out = _aside(below, [name for names in folders.values() for name in names])
    for label, class_name in enumerate(class_names):
        images: list[Path] = []
        others: LeftOut = []
        for folder in (below / name for name in folders.get(class_name, ())):
            if below.resolve().is_relative_to(folder.resolve()):
                raise UserError(f'{folder} is a link to a folder above itself; remove the link')
            more = find_images(folder)
            images, others = images + more[0], others + more[1]
        if not images and part in ('train', 'all'):
            others_too = f' (but {count_left_out(others)})' if others else ''
            raise UserError(
                f'{below / class_name} holds no images{others_too}; add some that end in '
                f'{", ".join(decode.SUFFIXES)}, or remove the folder'
            )
        listing |= {path.relative_to(root).as_posix(): label for path in images}
        left_out += others
    return listing, left_out


def _aside(below: Path, folders: Sequence[str]) -> LeftOut:
    """The files beside the folders that are read, images too."""
    images, others = find_images(below, without=folders)
    return [(str(path), NO_CLASS) for path in images] + others


def _sub_folders(folder: Path) -> list[str]:
    names = [name for name in os.listdir(folder) if not _companion(name)]
    return sorted(name for name in names if os.path.isdir(folder / name))


def source_of(
    name: str,
    root: Path,
    labels: Listing,
    files: dict[str, Finding],
    class_names: tuple[str, ...],
    left_out: LeftOut,
) -> Source:
    """The source of the readable ones of some image files, with their labels."""
    paths = [path for path in labels if not files[path].reason]
    for label in sorted({*labels.values()} - {labels[path] for path in paths}):
        raise UserError(f'{name} has no readable image of class {class_names[label]}; add some')
    found = [files[path] for path in paths]
    channels = max(finding.channels for finding in files.values())

    def read(i: int) -> np.ndarray:
        path = root / paths[i]
        try:
            data = decode.read_file(path)
            if hashlib.sha256(data).hexdigest() != found[i].sha256:
                raise CorruptImage('it holds other bytes')
            return decode.with_channels(decode.decode(data), channels)
        except (OSError, CorruptImage) as error:
            raise UserError(
                f'{path} has changed since the run began ({reason_of(error)}); leave the images '
                'alone while a run uses them, and start it again'
            ) from error

    content = [part for path in paths for part in (path, files[path].sha256)]
    return Source(
        name=name,
        class_names=class_names,
        labels=np.array([labels[path] for path in paths], np.int32),
        sizes=np.array([finding[:2] for finding in found], np.int32).reshape(-1, 2),
        channels=channels,
        read=read,
        describe=lambda i: str(root / paths[i]),
        fingerprint=digest(*class_names, *content),
        encoded=True,
        skipped=tuple(left_out),
        content=lambda i: found[i].sha256,
    )
