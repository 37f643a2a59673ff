"""Tables give the images of a folder, whatever their dialect, or a plain error."""

import os
import shutil
import unicodedata
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cnn_jax.data import decode
from cnn_jax.errors import UserError
from tests.data.conftest import open_source


@pytest.fixture
def root(tmp_path, write_images):
    return write_images(tmp_path / 'images', {'cat': 12, 'a dog': 8, '10': 4})


def rows_of(root):
    """The images of a folder in the order of its source, and their classes."""
    paths = sorted(root.glob('*/*.png'), key=lambda path: (path.parent.name, path.as_posix()))
    return [(path.relative_to(root).as_posix(), path.parent.name) for path in paths]


def text_of(rows, header='path,label', delimiter=','):
    lines = [f'"{path}"{delimiter}{label}' for path, label in rows]
    return '\n'.join([header.replace(',', delimiter), *lines, ''])


def of_table(path, split='all', max_corrupt=0.0, columns: Any = ()):
    return open_source(f'{path.suffix[1:]}:{path}', split, max_corrupt=max_corrupt, **dict(columns))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


DIALECTS = {
    'commas': text_of,
    'semicolons': lambda rows: text_of(rows, 'Image Path,CLASS', ';'),
    'tabs': lambda rows: text_of(rows, 'file_name,target', '\t'),
    'bars': lambda rows: text_of(rows, 'img,y', '|'),
    'byte order mark': lambda rows: '\ufeff' + text_of(rows),
    "Windows's line ends": lambda rows: text_of(rows).replace('\n', '\r\n'),
    'blank lines': lambda rows: text_of(rows).replace('\n', '\n\n'),
    'backslashes': lambda rows: text_of([(p.replace('/', '\\'), c) for p, c in rows]),
    'dots': lambda rows: text_of([(f'./cat/../{path}', c) for path, c in rows]),
}


@pytest.mark.parametrize('dialect', DIALECTS)
def test_every_dialect_is_the_folder(root, dialect):
    table = of_table(write(root / 'table.csv', DIALECTS[dialect](rows_of(root))))
    same_as(table, open_source(f'folder:{root}', split='all'))


def same_as(table, source):
    assert (table.class_names, table.skipped) == (source.class_names, ())
    assert table.fingerprint == source.fingerprint
    np.testing.assert_array_equal(table.labels, source.labels)
    np.testing.assert_array_equal(table[7][0], source[7][0])


@pytest.mark.parametrize('forms', [('NFC', 'NFD'), ('NFD', 'NFC'), ('NFD', 'NFD')])
def test_a_name_is_found_in_either_spelling(root, forms):
    on_disk, written = (unicodedata.normalize(form, 'cat/ü.png') for form in forms)
    first, *rest = rows_of(root)
    (root / first[0]).rename(root / on_disk)
    table = of_table(write(root / 'table.csv', text_of([(written, first[1]), *rest])))
    assert (len(table), table.skipped) == (24, ())


def test_paths_may_be_absolute_and_tables_several(root, tmp_path):
    rows, source = rows_of(root), open_source(f'folder:{root}', split='all')
    write(root / 'a1.csv', text_of(rows[:9]))
    write(root / 'a2.csv', text_of([(root / path, label) for path, label in rows[9:]]))
    same_as(of_table(root / 'a*.csv'), source)
    absolute = of_table(write(tmp_path / 't.csv', text_of([(root / p, c) for p, c in rows])))
    same_as_but_for_paths = absolute.labels.tolist(), absolute.describe(3)
    assert same_as_but_for_paths == (source.labels.tolist(), source.describe(3))


@pytest.mark.parametrize(
    ('labels', 'names'),
    [
        ([10, 9, 2], ('2', '9', '10')),
        ([1.0, 0.0, 2.0], ('0', '1', '2')),
        ([-1.0, 0.0, 1.0], ('-1', '0', '1')),
        ([-1, 0, 1], ('-1', '0', '1')),
        (['b', 'a', 'é'], ('a', 'b', 'é')),
        ([True, False, True], ('False', 'True')),
    ],
)
@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_labels_are_numbers_or_texts_and_columns_may_be_chosen(root, labels, names, kind):
    paths, chosen = [path for path, _ in rows_of(root)], [labels[i % 3] for i in range(24)]
    columns = {'path_column': 'where', 'label_column': 'what'}
    table = root / f'table.{kind}'
    if kind == 'csv':
        write(table, text_of(zip(paths, chosen), 'where,what'))
    else:
        parquet.write_table(pyarrow.table({'label': paths, 'where': paths, 'what': chosen}), table)
    source = of_table(table, columns=columns)
    assert source.class_names == names
    expected = [str(int(each) if type(each) is float else each) for each in chosen]
    assert [names[k] for k in source.labels] == expected


def test_a_column_gives_the_parts(root):
    of = ['train', 'Test', 'val', 'training']
    lines = [f'{path},{label},{of[i % 4]}' for i, (path, label) in enumerate(rows_of(root))]
    table = write(root / 'table.csv', '\n'.join(['path,label,split', *lines]))
    counts = {part: len(of_table(table, part)) for part in ('train', 'test', 'validation', 'all')}
    assert counts == {'train': 12, 'test': 6, 'validation': 6, 'all': 24}
    divided = write(root / 'other.csv', text_of(rows_of(root)))
    assert [len(of_table(divided, part)) for part in ('train', 'test')] == [18, 6]


def test_what_is_missing_or_damaged_is_skipped_and_listed(root):
    rows = rows_of(root)
    (root / rows[1][0]).write_bytes(b'no image')
    table = write(root / 'table.csv', text_of([('gone.png', 'cat'), *rows, ('cat', 'cat')]))
    with pytest.raises(UserError, match=r'3 of the 26 .*gone.png: No such file'):
        of_table(table, max_corrupt=0.1)
    source = of_table(table, max_corrupt=0.2)
    assert len(source) == 23
    assert [path for path, _ in source.skipped] == ['gone.png', rows[1][0], 'cat']


def test_a_table_and_its_folder_keep_an_index_each(root, monkeypatch):
    table = write(root / 'table.csv', text_of(rows_of(root)))
    for _ in range(2):
        of_table(table)
        open_source(f'folder:{root}', split='all')
        monkeypatch.setattr(decode, 'scan', None)  # nothing is read again


@pytest.mark.parametrize(
    ('content', 'word'),
    [
        ('', 'columns are none'),
        ('path,label\n', 'no rows'),
        ('where,label\ncat/0.png,cat\n', 'columns are where, label: .*data.path_column'),
        ('path,what\ncat/0.png,cat\n', 'columns are path, what: .*data.label_column'),
        ('path,label\ncat/0.png,\n', 'nothing in column label of row 1'),
        ('path,label\n\0,cat\n', 'nothing in column path of row 1'),
        ('path,label\na,b,c\n', '3 cells in row 1'),
        ('path,label,label\na,b,c\n', "two columns of the name 'label'"),
        ('path,label\n"a,b\n', 'unexpected end'),
        ('path,label\ncat/0.png,cat\ncat//0.png,dog\n', 'names cat/0.png once more in row 2'),
        ('path,label\ncat/0.png,c\x1bat\ncat/1.png,b\n', 'cannot be printed'),
        ('path,label\nx.png,a\ny.png,b\n', 'no file that .* relative to'),
        ('path,label,split\ncat/0.png,cat,holdout\n', "'holdout' as the part of row 1"),
        ('path,label,split\ncat/0.png,cat,test\n', 'rows of the parts test'),
        ('path,label\n'.encode('utf-16'), 'UTF-8'),
        ('path,label\ncat/0.png,é\n'.encode('latin-1'), 'UTF-8'),
    ],
)
def test_a_table_that_is_none(root, content, word):
    with pytest.raises(UserError, match=word):
        of_table(write(root / 'table.csv', content))


def test_labels_that_tell_images(root):
    distinct = [(path, f'L{i}') for i, (path, _) in enumerate(rows_of(root))]
    with pytest.raises(UserError, match='24 different labels in 24 rows'):
        of_table(write(root / 'table.csv', text_of(distinct)))


def test_files_that_are_no_tables(root):
    paths = [path for path, _ in rows_of(root)]
    pixels = pyarrow.table({'image': [{'bytes': b'x'}] * 24, 'label': paths})
    parquet.write_table(pixels, root / 'bytes.parquet')
    shutil.copy(root / 'bytes.parquet', root / 'cut.parquet')
    os.truncate(root / 'cut.parquet', 99)
    shutil.copy(root / 'cut.parquet', root / 'cut.csv')
    absent = r'does not exist; give a (csv|parquet) file'
    wrong = {'bytes.parquet': 'no text or number', 'cut.parquet': 'a whole Parquet'}
    wrong |= {'cut.csv': 'UTF-8', 'none.csv': absent, 'none.parquet': absent}
    for name, word in wrong.items():
        with pytest.raises(UserError, match=word):
            of_table(root / name)
    with pytest.raises(UserError, match='is a folder, a pipe or a device'):
        open_source(f'csv:{root}', split='all')
