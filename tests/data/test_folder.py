"""Folders of images: what is read, parts, content, damage, hostile names, and the index."""

import io
import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.folder import examine_files, find_images
from cnn_jax.data.source import count_left_out, remarks
from cnn_jax.errors import UserError
from tests.data.conftest import open_source


def open_folder(root, split='all', **options):
    return open_source(f'folder:{root}', split=split, **options)


def pixels(source):
    return np.stack([source[i][0] for i in range(len(source))])


# What is read.


def test_a_sub_folder_is_a_class(tmp_path, write_images, random_image):
    write_images(tmp_path, {'cat': 3, 'dog': 2})
    source = open_folder(tmp_path)
    assert source.class_names == ('cat', 'dog')
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.sizes.tolist() == [[8, 6]] * 5
    assert source.describe(4) == str(tmp_path / 'dog/1.png')
    expected = [random_image((8, 6, 3), seed) for seed in (0, 1, 2, 1000, 1001)]
    np.testing.assert_array_equal(pixels(source), expected)


LEFT_OUT = {
    'b/IMG_1.HEIC': 'HEIC (pip install -r requirements-heic.txt)',
    'b/notes.txt': '.txt',
    'b/odd.a ending?': 'of other endings',
    'b/README': 'without an ending',
    'b/._UPPER.JPG': 'hidden',
    'b/.thumbnails/0.png': 'hidden',
    '.git/HEAD': 'hidden',
    'b/@eaDir/0.png/THUMB.jpg': 'in @eaDir',
    '__MACOSX/b/._0.png': 'in __MACOSX',
    'loose.png': 'in no class folder',
    'Thumbs.db': '.db',
}


def test_everything_is_an_image_or_counted(tmp_path, write_images):
    write_images(tmp_path, {'a': 1, 'b': 1, 'b/deep/er': 1})
    image = Image.new('RGB', (6, 8))
    for name, kind in {'UPPER.JPG': 'JPEG', 'c.jfif': 'JPEG', 'd.TIFF': 'TIFF'}.items():
        image.save(tmp_path / 'a' / name, kind)
    for name in LEFT_OUT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name, 'PNG')
    (tmp_path / 'b/link').symlink_to(tmp_path)
    source = open_folder(tmp_path)
    found = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
    assert found == ['a/0.png', 'a/UPPER.JPG', 'a/c.jfif', 'a/d.TIFF', 'b/0.png', 'b/deep/er/0.png']
    assert source.class_names == ('a', 'b')
    assert dict(source.skipped) == LEFT_OUT | {'b/link': 'behind a link to a folder'}
    images, left_out = find_images(tmp_path)  # as launch.predict lists a folder
    assert {os.path.relpath(path, tmp_path) for path in images} == {*found, 'loose.png'}
    counted = count_left_out(left_out)
    assert counted.startswith('3 hidden, ')
    assert sum(int(part.split()[0]) for part in counted.split(', ')) == len(LEFT_OUT)


@pytest.mark.parametrize(('channels', 'expected'), [((1, 1), 1), ((3, 1), 3), ((3, 3), 3)])
def test_one_colour_image_makes_the_set_rgb(tmp_path, write_images, channels, expected):
    for name, count in zip('ab', channels):
        write_images(tmp_path, {name: 2}, channels=count)
    source = open_folder(tmp_path)
    assert source.channels == expected
    assert pixels(source).shape == (4, 8, 6, expected)


# Parts.


def test_parts_are_sub_folders(tmp_path, write_images):
    write_images(tmp_path / 'train', {'a': 3, 'b': 3})
    write_images(tmp_path / 'val', {'a': 2, 'b': 2})
    write_images(tmp_path / 'test', {'b': 1}, channels=1)
    lengths = [len(open_folder(tmp_path, s)) for s in ('train', 'validation', 'test', 'all')]
    assert lengths == [6, 4, 1, 11]
    test = open_folder(tmp_path, 'test')
    assert (test.labels.tolist(), test.class_names) == ([1], ('a', 'b'))
    assert test.channels == 3  # as in the other parts


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'dev'])
def test_validation_has_many_names_and_is_tested_on_without_test(tmp_path, write_images, name):
    write_images(tmp_path, {'train/a': 2, 'train/b': 2, f'{name}/a': 1, f'{name}/b': 1})
    parts = {split: open_folder(tmp_path, split) for split in ('val', 'valid', 'dev', 'test')}
    expected = open_folder(tmp_path, 'validation').fingerprint
    assert {part.fingerprint for part in parts.values()} == {expected}
    (note,) = parts['test'].notes
    assert 'no test part' in note
    assert not parts['val'].notes
    (tmp_path / 'test').mkdir()
    with pytest.raises(UserError, match='test has no images'):
        open_folder(tmp_path, 'test')


def test_loose_images_are_no_test_part(tmp_path, write_images):
    write_images(tmp_path, {'train/a': 5, 'train/b': 5, 'test': 3})
    with pytest.raises(UserError, match=r'images in .*test are in no class .*train\[80%:\]'):
        open_folder(tmp_path, 'test')
    part = open_folder(tmp_path, 'train[80%:]')
    assert (len(part), count_left_out(part.skipped)) == (2, '3 in no class folder')


def test_a_class_without_an_example_is_said(tmp_path, write_images):
    write_images(tmp_path, {'train/a': 2, 'train/b': 2, 'train/c': 1, 'test/a': 1, 'test/c': 0})
    train, test = open_folder(tmp_path, 'train'), open_folder(tmp_path, 'test')
    assert remarks(train, test) == ['there is no evaluation image of class b, c']


def test_both_forms_of_a_name_are_one_class(tmp_path, write_images):
    composed, decomposed = 'caf\u00e9', 'cafe\u0301'
    write_images(tmp_path, {f'train/{composed}': 2, f'train/{decomposed}': 1, 'train/b': 2})
    write_images(tmp_path, {f'test/{decomposed}': 1})
    for name in (composed, decomposed):
        train = open_folder(tmp_path, 'train', classes=('b', name))
        assert train.class_names == ('b', composed)
        assert np.bincount(train.labels).tolist() == [2, 3]
    assert open_folder(tmp_path, 'test').labels.tolist() == [1]


def test_a_class_may_be_called_train(tmp_path, write_images):
    write_images(tmp_path, {'plane': 2, 'train': 2})
    assert open_folder(tmp_path).class_names == ('plane', 'train')


# The fingerprint.


@pytest.fixture
def root(tmp_path, write_images):
    return write_images(tmp_path / 'set', {'a': 2, 'b': 2})


def test_the_fingerprint_is_of_the_content(root, tmp_path):
    original = open_folder(root).fingerprint
    shutil.copytree(root, tmp_path / 'copy')
    assert open_folder(tmp_path / 'copy').fingerprint == original
    os.utime(root / 'a/0.png', times=(0, 0))
    assert open_folder(root).fingerprint == original


@pytest.mark.parametrize(
    'change',
    [
        lambda root: (root / 'a/0.png').rename(root / 'a/2.png'),
        lambda root: (root / 'a').rename(root / 'aa'),
        lambda root: (root / 'a/0.png').unlink(),
        lambda root: shutil.copy(root / 'a/0.png', root / 'a/2.png'),
        lambda root: Image.new('RGB', (6, 8)).save(root / 'a/0.png'),
    ],
    ids=['file renamed', 'class renamed', 'file removed', 'file added', 'pixels changed'],
)
def test_every_change_of_content_shows(root, change):
    original = open_folder(root).fingerprint
    change(root)
    assert open_folder(root).fingerprint != original


# Damage.


def test_up_to_one_percent_is_skipped_and_recorded(tmp_path, write_images):
    write_images(tmp_path / 'train', {'a': 60, 'b': 60}, size=(2, 2))
    write_images(tmp_path / 'test', {'a': 10, 'b': 10}, size=(2, 2))
    whole = open_folder(tmp_path, 'test').fingerprint
    (tmp_path / 'train/b/7.png').write_bytes(b'damaged')
    train, test = (open_folder(tmp_path, split) for split in ('train', 'test'))
    assert np.bincount(train.labels).tolist() == [60, 59]
    ((path, reason),) = train.skipped
    assert (path, 'unreadable: not an image' in reason) == ('train/b/7.png', True)
    assert (test.skipped, test.fingerprint) == ((), whole)
    assert open_folder(tmp_path, 'train[:50]').skipped == train.skipped
    assert pixels(train).shape == (119, 2, 2, 3)


def test_a_class_without_a_readable_image(tmp_path, write_images):
    write_images(tmp_path, {'a': 99, 'b': 1}, size=(2, 2))
    (tmp_path / 'b/0.png').write_bytes(b'damaged')
    with pytest.raises(UserError, match='has no readable image of class b'):
        open_folder(tmp_path)


CHANGES = {
    'removed': (os.unlink, 'No such file or directory'),
    'damaged': (lambda path: path.write_bytes(b'damaged'), 'it holds other bytes'),
    'exchanged': (lambda path: shutil.copy(path.parent / '1.png', path), 'it holds other bytes'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_file_that_changes_while_it_is_used(root, change):
    source = open_folder(root)
    make, reason = CHANGES[change]
    make(root / 'a/0.png')
    with pytest.raises(UserError, match=rf'a/0.png has changed since the run began \({reason}\)'):
        source[0]


# Hostile names, links and contents.

NAMES = {
    'newline': 'two\nlines\r.png',
    'emoji': '🦊🏳️‍🌈.png',
    'not UTF-8': os.fsdecode(b'\xff\xfe.png'),
    '255 bytes': 'n' * 251 + '.png',
    'markup': '<script>"&\'.png',
    'a formula': '=1+1.png',
}


def test_every_name_is_only_a_name(root, random_image):
    for seed, name in enumerate(NAMES.values()):
        Image.fromarray(random_image((8, 6, 3), seed)).save(root / 'a' / name, 'PNG')
    source = open_folder(root)
    found = {source.describe(i): source[i][0] for i in range(len(source))}
    for seed, name in enumerate(NAMES.values()):
        np.testing.assert_array_equal(found[f'{root}/a/{name}'], random_image((8, 6, 3), seed))
    assert open_folder(root).fingerprint == source.fingerprint  # from the index


@pytest.mark.parametrize('name', ['emoji', '255 bytes', 'markup', 'a formula'])
def test_a_class_may_have_any_name_that_can_be_shown(root, name):
    (root / 'b').rename(root / NAMES[name])
    assert set(open_folder(root).class_names) == {'a', NAMES[name]}


@pytest.mark.parametrize('name', ['newline', 'not UTF-8'])
def test_a_class_name_that_cannot_be_shown(root, name):
    (root / 'b').rename(root / NAMES[name])
    with pytest.raises(UserError, match=r"^the folder '[ -~]+' gives a class its name, which"):
        open_folder(root)


def encode(kind, *images, **options):
    file = io.BytesIO()
    images[0].save(file, kind, append_images=images[1:], **options)
    return file.getvalue()


RED, BLUE = (Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue'))
BMP = encode('BMP', RED)  # its width and height are at byte 18
READABLE = {
    'animated.gif': encode('GIF', RED, BLUE, save_all=True),
    'one pixel.png': encode('PNG', RED.crop((0, 0, 1, 1))),
    'PNG inside.jpg': encode('PNG', RED),
}
CORRUPT = {
    'empty.png': b'',
    'text.png': b'not an image',
    'cut off.jpg': encode('JPEG', RED)[:-20],
    'bomb.bmp': BMP[:18] + struct.pack('<II', 60_000, 60_000) + BMP[26:],
}
LINKS = {'circle.png': 'circle.png', 'nowhere.png': 'none', 'device.png': '/dev/zero'}


@pytest.fixture
def hostile(root):
    """Images that can be read and files that cannot, in class b."""
    for name, content in (READABLE | CORRUPT).items():
        (root / 'b' / name).write_bytes(content)
    for name, target in LINKS.items():
        (root / 'b' / name).symlink_to(target)
    os.mkfifo(root / 'b/pipe.png')
    return root


def test_what_cannot_be_read_is_skipped_and_listed(hostile):
    source = open_folder(hostile, max_corrupt=0.7)
    read = {os.path.basename(source.describe(i)): source[i][0] for i in range(len(source))}
    assert read.keys() == {'0.png', '1.png', *READABLE}
    for name in READABLE:
        assert np.unique(read[name].reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]
    reasons = {path: reason.partition(': ')[2] for path, reason in source.skipped}
    assert 'pixels' in reasons.pop('b/bomb.bmp')
    assert reasons.pop('b/circle.png') == 'Too many levels of symbolic links'
    assert reasons.pop('b/nowhere.png') == 'No such file or directory'
    assert reasons.pop('b/device.png') == reasons.pop('b/pipe.png') == 'not a regular file'
    assert set(reasons) == {'b/empty.png', 'b/text.png', 'b/cut off.jpg'}
    assert all(reasons.values())


def test_links_to_images_and_classes_are_followed(root, tmp_path):
    (tmp_path / 'outside').mkdir()
    shutil.copy(root / 'a/0.png', tmp_path / 'outside/image')
    (root / 'a/link.png').symlink_to(tmp_path / 'outside/image')
    (root / 'c').symlink_to(root / 'b')
    source = open_folder(root)
    assert source.class_names == ('a', 'b', 'c')
    assert np.bincount(source.labels).tolist() == [3, 2, 2]
    np.testing.assert_array_equal(source[2][0], source[0][0])


def test_links_to_folders_inside_a_class_are_not_followed(root):
    (root / 'a/up').symlink_to(root)
    (root / 'a/self').symlink_to('self')
    (root / 'self').symlink_to('self')  # no class either
    assert np.bincount(open_folder(root).labels).tolist() == [2, 2]


@pytest.mark.parametrize('target', ['.', '..', '../..'])
def test_a_class_that_is_a_link_to_a_folder_above_it(root, target):
    (root / 'c').symlink_to(target)
    with pytest.raises(UserError, match='set/c is a link to a folder above itself; remove'):
        open_folder(root)


@pytest.mark.parametrize('denied', ['set', 'set/a', 'set/a/deep'])
def test_a_folder_that_cannot_be_listed(root, monkeypatch, denied):
    """Permissions, as root does not feel them."""
    (root / 'a/deep').mkdir()

    def deny(call):
        def listed(path):
            if os.fspath(path) == str(root.parent / denied):
                raise PermissionError(13, 'Permission denied', str(path))
            return call(path)

        return listed

    monkeypatch.setattr(os, 'listdir', deny(os.listdir))
    monkeypatch.setattr(os, 'scandir', deny(os.scandir))
    with pytest.raises(UserError, match=f'{denied} cannot be listed: Permission denied; make'):
        open_folder(root)


# Mistakes.

MISTAKES = {
    'no sub-folders': ({}, 'no sub-folders'),
    'an empty class': ({'a': 2, 'b': 2, 'c': 0}, 'set/c holds no images; add'),
    'a class that training lacks': (
        {'train/a': 1, 'train/b': 1, 'test/a': 1, 'test/c': 1},
        r'test/c is a class that .*train lacks',
    ),
    'two validation folders': (
        {f'{part}/{name}': 1 for part in ('train', 'val', 'validation') for name in 'ab'},
        'both val and validation',
    ),
    'capitals': (dict.fromkeys(('Train/a', 'Train/b', 'Test/a', 'Test/b'), 1), 'like parts'),
    'long names': (dict.fromkeys(('training/a', 'training/b', 'validation/a'), 1), 'like parts'),
    'no part': (dict.fromkeys(('train/a', 'train/b', 'extra/a'), 1), 'extra/, which is not a part'),
    'a class beside parts': (
        dict.fromkeys(('plane', 'car', 'train/steam', 'train/diesel'), 1),
        'car/, which is not a part',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_folders_are_named(tmp_path, write_images, mistake):
    folders, sentence = MISTAKES[mistake]
    (tmp_path / 'set').mkdir()
    with pytest.raises(UserError, match=sentence):
        open_folder(write_images(tmp_path / 'set', folders))
    with pytest.raises(UserError, match='nowhere is not a folder'):
        open_folder(tmp_path / 'nowhere')


# The index.

PATHS = ['a/0.png', 'a/1.png', 'b/0.png']


@pytest.fixture
def read(monkeypatch):
    """The number of files read since the last look."""
    counts = []
    scan = decode.scan
    monkeypatch.setattr(decode, 'scan', lambda data: counts.append(0) or scan(data))

    def count():
        n = len(counts)
        counts.clear()
        return n

    return count


def test_only_new_and_changed_files_are_read(root, read):
    first = examine_files(root, PATHS)
    assert (list(first), read()) == (PATHS, 3)
    assert (examine_files(root, PATHS), read()) == (first, 0)
    (root / 'a/1.png').write_bytes((root / 'b/0.png').read_bytes())
    second = examine_files(root, PATHS)
    assert read() == 1
    assert second['a/1.png'] == second['b/0.png']
    assert (examine_files(root, PATHS), read()) == (second, 0)
    assert list(examine_files(root, PATHS[:1])) == PATHS[:1]


def test_a_file_that_could_not_be_read_is_tried_again(root, read, monkeypatch):
    def fail(path):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(decode, 'read_file', fail)
        reasons = [each.reason for each in examine_files(root, PATHS).values()]
        assert (reasons, read()) == (['Permission denied'] * 3, 0)
    reasons = [each.reason for each in examine_files(root, PATHS).values()]
    assert (reasons, read()) == ([''] * 3, 3)
