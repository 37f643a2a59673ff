"""Folders of image files: one sub-folder a class, or the same under train/ and test/."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnn_jax.data import decode
from cnn_jax.data.folder_index import File, examined
from cnn_jax.data.scan import skipped
from cnn_jax.data.source import Source, digest
from cnn_jax.errors import UserError

PARTS = {'train': 'train', 'test': 'test', 'val': 'validation', 'validation': 'validation'}
Listing = list[tuple[str, int]]  # path below the root, with slashes, and label


def parts(folder: str) -> dict[str, Callable[[], Source]]:
    """The parts of a folder: `all`, or those of train/, test/ and val/ (validation/).

    Class names are the sub-folders' names, sorted; images are sought below them at any depth.
    Hidden files and files whose names do not end as images' do are left out.

    Errors:
        UserError: The folder is missing or has no sub-folders; a class has no images, or train/
            lacks it; more than 1% of the images cannot be read.
    """
    root, name = Path(folder).expanduser(), f'folder:{folder}'
    if not root.is_dir():
        raise UserError(f'{root} is not a folder; give one that holds a sub-folder for each class')
    layout = _layout(root)
    class_names = _class_names(layout)
    listings = {part: _listing(root, below, class_names) for part, below in layout.items()}
    # All parts are read for any of them: that the images are grey or RGB is decided by all.
    files = examined(root, [path for listing in listings.values() for path, _ in listing])
    skipped(name, list(files), [file.finding for file in files.values()])
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
        return {'all': root}
    layout = {}
    for folder, part in PARTS.items():
        if folder in below:
            if part in layout:
                raise UserError(f'{root} has both val and validation; remove or rename one')
            layout[part] = root / folder
    return layout


def _class_names(layout: dict[str, Path]) -> tuple[str, ...]:
    base = layout.get('train') or layout['all']
    class_names = tuple(_sub_folders(base))
    for below in layout.values():
        for other in _sub_folders(below):
            if other not in class_names:
                raise UserError(f'{below / other} is a class that {base} lacks; add or remove it')
    return class_names


def _listing(root: Path, below: Path, class_names: tuple[str, ...]) -> Listing:
    listing = []
    for label, class_name in enumerate(class_names):
        images = _image_files(below / class_name)
        if not images and (below / class_name).is_dir():
            raise UserError(
                f'{below / class_name} holds no images ({", ".join(decode.SUFFIXES)}); '
                'add some or remove the folder'
            )
        listing += [(path.relative_to(root).as_posix(), label) for path in images]
    return listing


def _image_files(folder: Path) -> list[Path]:
    found = [
        Path(below, file)
        for below, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(decode.SUFFIXES)
    ]
    hidden = len(folder.parts)
    visible = [f for f in found if not any(p.startswith('.') for p in f.parts[hidden:])]
    return sorted(visible, key=lambda path: path.as_posix())


def _sub_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith('.')
    )


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
            return decode.with_channels(decode.decode(path.read_bytes()), channels)
        except (OSError, decode.CorruptImage) as error:
            raise UserError(f'{path} could be read before, but not now: {error}') from error

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
