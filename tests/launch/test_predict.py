"""launch.predict with Monte-Carlo dropout."""

import json
import math
import os
import shutil


def test_mc_adds_the_uncertainty_and_repeats_itself(launch, tiny_run, tmp_path):
    folder, _ = tiny_run
    launch('sample', '--source=digits', '--count=3', f'--out={tmp_path}', check=0)
    command = 'predict', f'--workdir={folder}', '--mc=5', tmp_path
    done = launch(*command, '--json', check=0)
    rows = json.loads(done.stdout)
    assert len(rows) == 3
    for row in rows:
        assert 0 < row['mutual_information'] < row['entropy'] < math.log(10)
    assert launch(*command, '--json', check=0).stdout == done.stdout
    table = launch(*command, check=0).stdout
    assert table.count('  entropy ') == table.count('  mutual information ') == 3


def test_a_file_given_twice_or_unreadable_among_others_keeps_its_place(launch, tiny_run, tmp_path):
    folder, _ = tiny_run
    launch('sample', '--source=digits', '--count=2', f'--out={tmp_path}', check=0)
    one, two = sorted(tmp_path.glob('*.png'))
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'not an image')
    paths = [one, broken, two, one] * 10  # more than are computed at once
    done = launch('predict', f'--workdir={folder}', '--json', *paths, check=0)
    rows = json.loads(done.stdout)
    assert [row['file'] for row in rows] == [str(path) for path in paths]
    assert [row == rows[0] for row in rows] == [path == one for path in paths]


def test_heat_maps_are_drawn_whatever_a_file_is_called(launch, tiny_run, tmp_path):
    folder, _ = tiny_run
    launch('sample', '--source=digits', '--count=1', f'--out={tmp_path}', check=0)
    (image,) = tmp_path.glob('*.png')
    names = [os.fsdecode(b'caf\xe9.png'), '図' * 80 + '.png', '$5_$10.png']
    for name in names:
        shutil.copy(image, tmp_path / name)
    maps = tmp_path / 'maps'
    paths = [tmp_path / name for name in names]
    launch('predict', f'--workdir={folder}', f'--heatmaps={maps}', *paths, check=0)
    assert len(list(maps.glob('*.png'))) == 3
