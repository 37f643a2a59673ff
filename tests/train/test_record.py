import csv
import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax import config
from cnn_jax.data.batches import open_batches
from cnn_jax.data.decode import FORMATS
from cnn_jax.train import setup
from cnn_jax.train.record import write_skipped


def opened(*skipped):
    return SimpleNamespace(skipped=skipped)


def rows(folder):
    with open(folder / 'skipped.csv', newline='', encoding='utf-8', errors='surrogateescape') as f:
        head, *rows = csv.reader(f)
    assert head == ['split', 'path', 'reason']
    return [tuple(row) for row in rows]


def test_every_image_left_out_has_a_row(tmp_path):
    a, b = ('a/0.png', 'cut off'), ('b/1.png', 'empty, "quoted"\nand more')
    assert write_skipped(tmp_path, {'train': opened(a, b), 'eval': opened(b)}) == 2
    assert rows(tmp_path) == [('train', *a), ('train', *b), ('eval', *b)]


def test_nothing_left_out_leaves_no_file(tmp_path):
    assert write_skipped(tmp_path, {'train': opened(('a', 'b'))}) == 1
    assert write_skipped(tmp_path, {'train': opened(), 'eval': opened()}) == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('path', ['=1+1.png', '+a', '-a', '@a', '\ta', '\ra'])
def test_no_path_is_a_formula(tmp_path, path):
    write_skipped(tmp_path, {'train': opened((path, 'cut off'))})
    assert rows(tmp_path) == [('train', f'./{path}', 'cut off')]


@settings(derandomize=True)
@given(st.binary(min_size=1, max_size=255).filter(lambda name: b'\0' not in name))
def test_every_name_survives(tmp_path, name):
    path = 'class/' + os.fsdecode(name)
    write_skipped(tmp_path, {'train': opened((path, 'cut off'))})
    assert rows(tmp_path) == [('train', path, 'cut off')]
    ((_, read, _),) = rows(tmp_path)
    assert os.fsencode(read) == b'class/' + name


@pytest.mark.parametrize('stream', ['always', 'never'])
def test_the_batches_of_a_folder_are_listed(tmp_path, stream):
    from PIL import Image

    for name in ('a/0', 'a/1', 'a/2', 'b/0', 'b/1', 'b/2'):
        (tmp_path / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (4, 4)).save(tmp_path / 'images' / f'{name}.png')
    (tmp_path / 'images/b/2.png').write_bytes(b'')
    data = config.Data(source=f'folder:{tmp_path}/images', batch=2, stream=stream, max_corrupt=0.2)
    batches = {split: open_batches(data, split) for split in ('train', 'eval')}
    assert write_skipped(tmp_path, batches) == 1
    reason = f'unreadable: not an image in {", ".join(FORMATS)} format'
    assert rows(tmp_path) == [(split, 'b/2.png', reason) for split in ('train', 'eval')]


def test_slices_that_have_images_in_common_are_told():
    given = config.Config(data=config.Data('digits', train='train[:500]', eval='all[1000:]'))
    data = setup.open_data(given)
    train, test = (
        {split.describe(i): split.read([i]).tobytes() for i in range(split.n)}
        for split in (data.train, data.test)
    )
    shared = train.keys() & test.keys()
    assert all(train[each] == test[each] for each in shared)
    (note,) = setup.shared_images(given, data)
    assert f'{len(shared)} of the 797 images of config.data.eval=all[1000:]' in note
    apart = config.replace(given, {'data.train': 'all[:1000]'})
    assert setup.shared_images(apart, setup.open_data(apart)) == []
