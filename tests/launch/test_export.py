"""An export is used as its README says, in a process that has neither this package nor Flax."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

BLOCK = 'import sys\nfor name in ("cnn_jax", "flax", "orbax"): sys.modules[name] = None\n'


@pytest.fixture(scope='module')
def exported(launch, tiny_run, tmp_path_factory):
    """The export of a tiny run, and eight images."""
    folder = tmp_path_factory.mktemp('export')
    launch('sample', '--source=digits', '--count=8', f'--out={folder}/images', check=0)
    launch('export', f'--workdir={tiny_run[0]}', f'--out={folder}/out', check=0)
    return folder / 'out', sorted((folder / 'images').iterdir())


def as_the_readme_says(out, paths):
    code = (out / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    done = subprocess.run(
        [sys.executable, '-c', BLOCK + code, *map(str, paths)],
        cwd=out,
        env={name: text for name, text in os.environ.items() if name != 'PYTHONPATH'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(' ', 2) for line in done.stdout.splitlines()]
    return {path: (name, float(probability)) for path, name, probability in rows}


@pytest.mark.parametrize('count', [1, 3, 8])
def test_it_gives_the_numbers_of_predict_for_any_batch_size(launch, tiny_run, exported, count):
    out, paths = exported
    ours = launch('predict', f'--workdir={tiny_run[0]}', '--json', *paths[:count], check=0)
    theirs = as_the_readme_says(out, paths[:count])
    for row in json.loads(ours.stdout):
        name, probability = theirs[row['file']]
        assert name == row['class']
        np.testing.assert_allclose(probability, row['probability'], rtol=1e-5)


def test_it_is_complete_and_without_pickle(tiny_run, exported):
    out, _ = exported
    names = {path.name for path in out.iterdir()}
    assert names == {'model.stablehlo', 'weights.safetensors', 'classes.json', 'README.md'}
    facts = json.loads((out / 'classes.json').read_text())
    assert facts['classes'] == list('0123456789')
    assert facts['image_shape'] == [8, 8, 1]
    last = json.loads((tiny_run[0] / 'metrics.jsonl').read_text().splitlines()[-1])
    assert facts['evaluation']['count'] == 364
    assert facts['evaluation']['accuracy'] == last['accuracy']
    assert f'accuracy {last["accuracy"]:.4f}' in (out / 'README.md').read_text()
    for path in out.iterdir():
        assert not path.read_bytes().startswith(b'\x80'), 'a pickle starts so'


def test_a_folder_with_something_in_it_is_left_alone(launch, tiny_run, exported):
    out, _ = exported
    before = (out / 'README.md').stat().st_mtime_ns
    done = launch('export', f'--workdir={tiny_run[0]}', f'--out={out}', check=2)
    assert 'not empty' in done.stderr
    assert (out / 'README.md').stat().st_mtime_ns == before


def test_predict_draws_heat_maps(launch, tiny_run, exported, tmp_path):
    _, paths = exported
    maps = tmp_path / 'maps'
    done = launch('predict', f'--workdir={tiny_run[0]}', f'--heatmaps={maps}', *paths[:2], check=0)
    assert '2 heat maps' in done.stderr
    drawn = sorted(maps.iterdir())
    assert [path.name[:4] for path in drawn] == ['000_', '001_']
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in drawn)


def test_heat_maps_do_not_go_where_a_file_is(launch, tiny_run, exported, tmp_path):
    _, paths = exported
    (tmp_path / 'file').write_text('mine')
    maps = f'--heatmaps={tmp_path}/file'
    done = launch('predict', f'--workdir={tiny_run[0]}', maps, paths[0], check=2)
    assert 'choose another --heatmaps' in done.stderr
    assert (tmp_path / 'file').read_text() == 'mine'
