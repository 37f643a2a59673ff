"""Networks that the launcher wrote as ONNX, in ONNX Runtime, against the runs they are of."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from cnn_jax.tools.predict import predict_files
from cnn_jax.train.run import load_run
from tests.environments import ROOT, environment

BLOCK = 'import sys\nfor name in ("cnn_jax", "flax", "jax"): sys.modules[name] = None\n'
COLOUR = '--config.data.resize=stretch', '--config.data.size=32', '--config.data.channels=3'
VGG16 = (
    '--config.model.name=vgg16',
    '--config.model.outputs=0',
    '--config.model.weights=random',
    '--config.model.cut=block3_pool',
    "--config.train.frozen=('backbone/*',)",
)
NETS = {
    'strided': ('strided', *COLOUR, '--config.model.downsample=max_pool'),
    'group': (
        *('small', '--config.model.norm=group', '--config.model.padding=REFLECT'),
        '--config.model.downsample=avg_pool',
    ),
    'instance': ('small', '--config.model.norm=instance', '--config.model.residual=True'),
    'vgg16': ('finetune_vgg16', *COLOUR, *VGG16),
    'own': ('own_resnet',),
    'bfloat16': ('small', '--config.model.dtype=bfloat16'),
}
EXPORT = """import sys
from pathlib import Path
from cnn_jax.tools.export import export
from cnn_jax.train.run import load_run
for place in map(Path, sys.argv[1:]):
    export(load_run(place / 'run'), place / 'out', 'onnx')
"""


def converting(*arguments):
    """Runs Python where the converter is."""
    command = [environment('onnx', 'requirements-onnx.txt'), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def exported(launch, tmp_path_factory):
    """Trains the networks for some steps and exports them: a folder of each."""
    places = {net: tmp_path_factory.mktemp(net) for net in NETS}
    for net, (experiment, *flags) in NETS.items():
        digits = ('--config.data.source=digits', '--config.data.train=train[:320]') * (net != 'own')
        # Direct sums, as ONNX Runtime has them.
        short = '--config.data.batch=32', '--config.train.epochs=2', '--config.augment.crop=0'
        short = *short, '--config.model.winograd=never'
        flags = f'--config=experiments/{experiment}.py', *digits, *short, *flags
        launch('train', *flags, f'--workdir={places[net]}/run', check=0)
    converting('-c', EXPORT, *places.values())
    return places


@pytest.mark.slow
@pytest.mark.parametrize('net', NETS)
def test_onnx_runtime_gives_the_numbers_of_the_network_for_any_batch_size(exported, net):
    run = load_run(exported[net] / 'run')
    session = onnxruntime.InferenceSession(exported[net] / 'out' / 'model.onnx')
    draw = np.random.default_rng(0)
    rounding = {'atol': 0.03} if net == 'bfloat16' else {'atol': 1e-5}  # ONNX's is of float32
    for count in (1, 3, 8):
        images = draw.integers(0, 256, (count, *run.spec.image_shape), np.uint8)
        (got,) = session.run(None, {'images': images})
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, run.predict(images), rtol=1e-5, **rounding)


@pytest.mark.slow
def test_the_readme_needs_neither_this_package_nor_jax(tiny_run, images, tmp_path):
    (workdir, _), folder = tiny_run, tmp_path / 'out'
    places = f'--workdir={workdir}', f'--out={folder}'
    converting('-m', 'launch.export', *places, '--format=onnx')
    code = (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    done = subprocess.run(
        [sys.executable, '-c', BLOCK + code, *map(str, images)],
        cwd=folder,
        env={name: text for name, text in os.environ.items() if name != 'PYTHONPATH'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line, row in zip(
        done.stdout.splitlines(), predict_files(load_run(workdir), images), strict=True
    ):
        path, name, probability = line.split()
        assert (path, name) == (str(row.path), row.classes[0][0])
        np.testing.assert_allclose(float(probability), row.classes[0][1], rtol=1e-5)
    properties = {each.key for each in onnx.load(folder / 'model.onnx').metadata_props}
    assert 'config_hash' in properties


@pytest.mark.skipif(importlib.util.find_spec('jax2onnx') is not None, reason='there is jax2onnx')
def test_without_the_converter_one_is_told_how_to_get_it(launch, tiny_run, tmp_path):
    folder, _ = tiny_run
    out = f'--out={tmp_path}/out'
    done = launch('export', f'--workdir={folder}', out, '--format=onnx', check=2)
    assert 'requirements-onnx.txt' in done.stderr
    assert not (tmp_path / 'out').exists()
