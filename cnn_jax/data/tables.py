"""Tables of image files, CSV or Parquet: a column of paths, one of labels, perhaps one of parts."""

import csv
import functools
import glob
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cnn_jax import config
from cnn_jax.data.decode import skipped
from cnn_jax.data.folder import PARTS, Listing, check_class_name, examine_files, source_of
from cnn_jax.data.source import Source
from cnn_jax.errors import UserError, nearest, reason_of
from cnn_jax.files import local_path

# By the config field that chooses a column: the names that are looked for, the first found first,
# without capitals, spaces, _ and -.
COLUMNS = {
    'path_column': 'path filepath file filename imagepath imagefile imagename image img',
    'label_column': 'label labels class classname category target species y',
    'split_column': 'split subset partition part set',
}
SPLITS = PARTS | {'training': 'train', 'testing': 'test', 'eval': 'validation'}
DELIMITERS = ',;\t|'
FEW = 20  # rows, of which most may have a label of their own
Rows = dict[str, Callable[[], list[Any]]]  # the cells of each column


def parts(kind: str, files: str, data: config.Data) -> dict[str, Callable[[], Source]]:
    """The parts of a table: those of its column of parts, else `all`.

    Paths are absolute, or relative to the folder of their table. Labels are texts or whole numbers;
    classes are in their order.

    Args:
        kind: csv (UTF-8 with a header, separated by one of `DELIMITERS`) or parquet.
        files: The path of a table, or a pattern of several, such as `labels/*.csv`.
        data: Its fields in `COLUMNS` name the columns to take ('' for one of the usual names),
            `max_corrupt` the largest fraction of images that may be missing or unreadable.

    Errors:
        UserError: There is no such table or column, a cell is empty, an image is named twice,
            labels tell images and no classes; more than `max_corrupt` images cannot be read.
    """
    name = f'{kind}:{files}'
    pattern = local_path(files, 'config.data.source')
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f'{pattern} does not exist; give a {kind} file, or a pattern of several')
    root, labels, split_of = Path(found[0]).parent, {}, {}
    for table in map(Path, found):
        if not table.is_file():
            raise UserError(f'{table} is a folder, a pipe or a device; give a {kind} file')
        rows = _chosen(table, (_read_csv if kind == 'csv' else _read_parquet)(table), data)
        for number, (path, label, split) in enumerate(zip(*rows), 1):
            path = _below(root, table.parent, path)
            if path in labels:
                raise UserError(f'{table} names {path} once more in row {number}; remove one')
            labels[path], split_of[path] = label, split
    if not labels:
        raise UserError(f'{name} has no rows below its header; give a table that names images')
    names = dict.fromkeys(split_of.values())
    if ('all' in names and len(names) > 1) or not names.keys() & {'all', 'train'}:
        raise UserError(
            f'{name} has rows of the parts {", ".join(names)}; write train for those to train on, '
            'and a part in every table'
        )
    class_names = _class_names(list(labels.values()), name)
    if not any(os.path.exists(root / path) for path in labels):
        raise UserError(
            f'no file that {name} names exists, such as {root / next(iter(labels))}; '
            f'paths must be absolute or relative to {root}'
        )
    number_of = {label: number for number, label in enumerate(class_names)}
    listing: Listing = {path: number_of[label] for path, label in labels.items()}
    files_ = examine_files(root, list(listing), name)
    unreadable = skipped(name, list(files_), list(files_.values()), data.max_corrupt)

    def open_part(part: str) -> Source:
        own = {path: label for path, label in listing.items() if split_of[path] == part}
        left = [row for row in unreadable if row[0] in own]
        part_name = name if part == 'all' else f'{name} {part}'
        return source_of(part_name, root, own, files_, class_names, left)

    return {part: functools.partial(open_part, part) for part in names}


def _read_csv(path: Path) -> Rows:
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(DELIMITERS, key=header.count), strict=True)
            names, *rows = [row for row in reader if row] or [[]]
            wrong = next((n for n, row in enumerate(rows, 1) if len(row) != len(names)), None)
    except (OSError, UnicodeError, csv.Error) as error:
        reason = reason_of(error)
        raise UserError(f'{path} cannot be read as CSV in UTF-8 ({reason}); save it so') from error
    if wrong:
        raise UserError(
            f'{path} has {len(rows[wrong - 1])} cells in row {wrong} and {len(names)} in its '
            'header; quote what holds the delimiter'
        )
    _check_names(names, path)
    return {name: lambda i=i: [row[i] for row in rows] for i, name in enumerate(names)}


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition('\n')[0]
        raise UserError(f'{path} is not a whole Parquet file ({reason}); write it again') from error
    names = file.schema_arrow.names
    _check_names(names, path)
    return {name: lambda name=name: file.read([name]).column(0).to_pylist() for name in names}


def _check_names(names: Sequence[str], path: Path) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'{path} has two columns of the name {twice[0]!r}; rename one')


def _chosen(table: Path, rows: Rows, data: config.Data) -> tuple[list[str], ...]:
    """The paths, labels and parts of a table's rows."""
    there = {re.sub(r'[\s_-]', '', name.lower()): name for name in reversed(rows)}
    texts: list[list[str]] = []
    for field, usual in COLUMNS.items():
        known = (there[name] for name in usual.split() if name in there)
        column = getattr(data, field) or next(known, '')
        if not column and field == 'split_column':
            texts.append(['all'] * len(texts[0]))
            continue
        if column not in rows:
            what = f'no usual name of a {field.replace("_", " ")}'
            what = f'no column {column!r}{nearest(column, list(rows))}' if column else what
            raise UserError(
                f'{table} has {what}; its columns are {", ".join(rows) or "none"}: choose one by '
                f'config.data.{field}'
            )
        try:
            values = rows[column]()
        except (OSError, ValueError) as error:  # Arrow's are ValueErrors
            raise UserError(
                f'{table}: its column {column} cannot be read ({reason_of(error)}); store it as '
                'text or whole numbers'
            ) from error
        texts.append([_text(value, table, column, n) for n, value in enumerate(values, 1)])
    for number, split in enumerate(texts[2], 1):
        if split != 'all' and split.lower() not in SPLITS:
            raise UserError(
                f'{table} has {split!r} as the part of row {number}; write {", ".join(PARTS)}, or '
                'choose another column by config.data.split_column'
            )
    # Spellings of one label: 3.0 where whole numbers were stored as floats, NFD.
    whole = (re.sub(r'^(-?\d+)\.0$', r'\1', label) for label in texts[1])
    texts[1] = [unicodedata.normalize('NFC', label) for label in whole]
    return texts[0], texts[1], [SPLITS.get(split.lower(), 'all') for split in texts[2]]


def _text(value: Any, table: Path, column: str, number: int) -> str:
    """A cell as text."""
    if isinstance(value, (dict, list, bytes)):
        raise UserError(f'{table} holds no text or number in column {column}; choose another')
    text = '' if value is None or value != value else str(value).strip()
    if not text or '\0' in text:
        raise UserError(
            f'{table} has nothing in column {column} of row {number}; fill or remove it'
        )
    return text


def _below(root: Path, folder: Path, path: str) -> str:
    """A path in a table of `folder`, relative to `root` where it lies below it."""
    path = path if '/' in path else path.replace('\\', '/')
    if not path.isascii():  # ü may be written as one character or as two
        spellings = path, *(unicodedata.normalize(form, path) for form in ('NFC', 'NFD'))
        path = next((each for each in spellings if os.path.exists(folder / each)), path)
    whole = Path(os.path.normpath(folder / path))
    return (whole.relative_to(root) if whole.is_relative_to(root) else whole).as_posix()


def _class_names(labels: Sequence[str], name: str) -> tuple[str, ...]:
    names = sorted({*labels})
    if all(re.fullmatch(r'-?\d{1,18}', each) for each in names):
        names.sort(key=int)
    if FEW <= len(labels) < 2 * len(names):
        raise UserError(
            f'{name} has {len(names):,} different labels in {len(labels):,} rows, such as '
            f'{names[0]!r}, which tell images and no classes; choose another column by '
            'config.data.label_column'
        )
    for each in names:
        check_class_name(each, f'the label {each!r} of {name}')
    return tuple(names)
