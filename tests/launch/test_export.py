"""An export is used as its README says, in a process that has neither this package nor Flax."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

BLOCK = 'import sys\nfor name in ("cnn_jax", "flax", "orbax"): sys.modules[name] = None\n'


@pytest.fixture(scope='module')
def exported(launch, tiny_run, images, tmp_path_factory):
    """The export of a tiny run, and eight images."""
    out = tmp_path_factory.mktemp('export') / 'out'
    launch('export', f'--workdir={tiny_run[0]}', f'--out={out}', check=0)
    return out, images


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


def test_it_gives_the_numbers_of_predict_for_any_batch_size(launch, tiny_run, exported):
    out, paths = exported
    done = launch('predict', f'--workdir={tiny_run[0]}', '--json', *paths, check=0)
    rows = map(json.loads, done.stdout.splitlines())
    ours = {row['file']: (row['class'], row['probability']) for row in rows}
    for count in (1, 3, 8):
        for path, (name, probability) in as_the_readme_says(out, paths[:count]).items():
            assert name == ours[path][0]
            np.testing.assert_allclose(probability, ours[path][1], rtol=1e-5)


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
