"""The exported function and its README against the network they were made from."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
import onnx
import pytest
from jax import export as jax_export
from onnx import helper
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from cnn_jax.errors import UserError
from cnn_jax.tools.export import OPSET, PLATFORMS, export, readme
from cnn_jax.tools.predict import predict_files
from cnn_jax.train.program import RunSpec, make_program, state_maker
from cnn_jax.train.run import Curves, Run
from cnn_jax.train.setup import preparation

BLOCK = 'import sys\nfor name in ("cnn_jax", "flax", "orbax"): sys.modules[name] = None\n'
VGG = {'model__name': 'vgg16', 'model__cut': 'block2_pool', 'model__head_norm': 'none'}
DIRECT = {'model__winograd': 'never'}  # as XLA computes the exported one
LICENCE = 'CC BY 4.0, Visual Geometry Group'


@pytest.fixture
def opened(small):
    """Makes what `load_run` returns, of a network that was never trained."""

    def make(shape=(8, 8, 1), classes=('a', 'b', 'c'), preprocessing=None, **changes):
        config = small(**changes)
        facts = preprocessing or {
            'kind': 'standardize',
            'mean': [0.3] * shape[-1],
            'std': [0.2] * shape[-1],
            'channels': shape[-1],
        }
        spec = RunSpec(shape, len(classes), preparation(facts), 10.0, phase_ends=(50,))
        program = make_program(config, spec)
        data = {
            'source': 'made up',
            'class_names': list(classes),
            'image_shape': list(shape),
            'preprocessing': facts,
            'train': {'count': 1234},
        }
        state = state_maker(program)(config.seed)
        return Run('', config, {'data': data}, spec, program, state, 7, {}, Curves([]))

    return make


def images_of(run, count):
    draw = np.random.default_rng(count)
    return draw.integers(0, 256, (count, *run.spec.image_shape), np.uint8)


def loaded(folder):
    function = jax_export.deserialize((folder / 'model.stablehlo').read_bytes())
    return function, load_file(folder / 'weights.safetensors')


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'model__norm': 'none', 'model__downsample': 'max_pool'},
        {'model__dtype': 'bfloat16'},
        {'model__outputs': 1, 'classes': ('4', '9'), 'shape': (32, 32, 3), **VGG, **DIRECT},
    ],
    ids=['strided', 'pooled', 'bfloat16', 'vgg16'],
)
def test_it_gives_the_numbers_of_the_network_for_any_batch_size(opened, tmp_path, options):
    run = opened(**options)
    export(run, tmp_path / 'out')
    function, weights = loaded(tmp_path / 'out')
    assert function.platforms == PLATFORMS
    for count in (1, 3, 8):
        images = images_of(run, count)
        expected = run.predict(images)
        got = function.call(weights, images)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got.sum(axis=-1), 1, rtol=1e-5)


def test_the_weights_are_an_argument_and_not_in_the_program(opened, tmp_path):
    run = opened(model__hidden=(512,))
    export(run, tmp_path / 'out')
    function, weights = loaded(tmp_path / 'out')
    size = {path.name: path.stat().st_size for path in (tmp_path / 'out').iterdir()}
    assert size['model.stablehlo'] < 30_000 < 50_000 < size['weights.safetensors']
    zeros = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    np.testing.assert_allclose(function.call(zeros, images_of(run, 2)), 1 / 3, rtol=1e-6)


def test_averaged_weights_are_exported_where_there_are_any(opened, tmp_path):
    run = opened(train__ema=0.9)
    shifted = {name: leaf + 1 for name, leaf in run.state.averaged.items()}
    run = dataclasses.replace(run, state=dataclasses.replace(run.state, averaged=shifted))
    export(run, tmp_path / 'out')
    _, weights = loaded(tmp_path / 'out')
    learned = {name.removeprefix('params/'): w for name, w in weights.items() if 'params/' in name}
    assert learned.keys() == shifted.keys()
    for name, leaf in shifted.items():
        np.testing.assert_array_equal(learned[name], leaf)


def photographs(folder):
    """One picture in each of the ways in which files differ from rows of pixels."""
    draw = np.random.default_rng(0)
    pixels = np.kron(draw.integers(0, 256, (5, 7, 3)), np.ones((6, 6, 1))).astype(np.uint8)
    picture = Image.fromarray(pixels)  # 42 × 30 pixels, RGB
    veil = Image.fromarray(np.tile(np.linspace(0, 255, 42).astype(np.uint8), (30, 1)))
    sideways = Image.Exif()
    sideways[0x0112] = 6
    picture.save(folder / 'plain.png')
    picture.save(folder / 'sideways.jpg', exif=sideways)
    picture.convert('L').save(folder / 'grey.png')
    picture.convert('1').save(folder / 'bits.png')
    picture.convert('CMYK').save(folder / 'cmyk.jpg')
    picture.quantize(8).save(folder / 'palette.gif')
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 251).save(folder / 'deep.png')
    lowest = int(pixels[..., 0].min()) * 251
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 251)
    deep.save(folder / 'deep_and_veiled.png', transparency=lowest)
    for mode, name in (('RGB', 'veiled.png'), ('L', 'veiled_grey.png')):
        veiled = picture.convert(mode)
        veiled.putalpha(veil)
        veiled.save(folder / name)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(('shape', 'resize'), [((8, 8, 1), 'stretch'), ((8, 8, 3), 'crop')])
def test_the_readme_reads_photographs_as_the_training_does(opened, tmp_path, shape, resize):
    run = opened(shape, data__resize=resize, data__size=8)
    (tmp_path / 'in').mkdir()
    paths = photographs(tmp_path / 'in')
    export(run, tmp_path / 'out')
    code = (tmp_path / 'out' / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    done = subprocess.run(
        [sys.executable, '-c', BLOCK + code, *map(str, paths)],
        cwd=tmp_path / 'out',
        env={name: text for name, text in os.environ.items() if name != 'PYTHONPATH'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.splitlines()]
    ours = list(predict_files(run, paths))
    # To a network of one channel plain.png and grey.png are the same.
    assert len({row.classes for row in ours}) >= len(paths) - 1
    for row, (path, name, probability) in zip(ours, printed, strict=True):
        assert (path, name) == (str(row.path), row.classes[0][0])
        np.testing.assert_allclose(float(probability), row.classes[0][1], rtol=1e-5)


def test_it_says_what_it_is(opened, tmp_path):
    spec = {'kind': 'caffe', 'weights': 'd9a2', 'licence': LICENCE}
    run = opened((32, 32, 3), preprocessing=spec, **VGG)
    measured = {'loss': 0.25, 'accuracy': 0.9, 'calibration_error': 0.02}  # no top5 of three
    evaluated = measured | {'count': 5000, 'class_accuracy': [0.9] * 3}
    export(dataclasses.replace(run, metrics=evaluated), tmp_path / 'out')
    facts = json.loads((tmp_path / 'out' / 'classes.json').read_text())
    assert facts['classes'] == ['a', 'b', 'c']
    assert facts['image_shape'] == [32, 32, 3]
    assert facts['preprocessing'] == spec
    assert facts['evaluation'] == measured | {'count': 5000}
    text = (tmp_path / 'out' / 'README.md').read_text()
    for words in ('1,234 images, 7 steps', 'accuracy 0.9000', LICENCE, facts['config_hash']):
        assert words in text, words
    assert text == readme(facts)
    with safe_open(tmp_path / 'out' / 'weights.safetensors', 'numpy') as file:
        assert file.metadata() == {'config_hash': facts['config_hash'], 'licence': LICENCE}


def test_a_folder_is_whole_or_absent(opened, tmp_path, monkeypatch):
    run = opened()
    (tmp_path / 'empty').mkdir()
    export(run, tmp_path / 'empty')
    assert len(list((tmp_path / 'empty').iterdir())) == 4
    with pytest.raises(UserError, match='not empty'):
        export(run, tmp_path / 'empty')
    (tmp_path / 'file').write_text('mine')
    for place in ('file', 'file/out'):
        with pytest.raises(UserError, match='choose another --out'):
            export(run, tmp_path / place)

    def disk_is_full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_bytes', disk_is_full)
    with pytest.raises(UserError, match='No space left'):
        export(run, tmp_path / 'out')
    assert {path.name for path in tmp_path.iterdir()} == {'empty', 'file'}


def test_a_converter_that_errs_is_found_out(opened, tmp_path, monkeypatch):
    """Also one whose network answers, but with other numbers."""
    run = opened()

    def certain(*_, **__):
        value = onnx.numpy_helper.from_array(np.float32([[1, 0, 0]] * 2))
        node = helper.make_node('Constant', [], ['out'], value=value)
        ends = [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in (('images', 2, ['b', 8, 8, 1]), ('out', 1, ['b', 3]))
        ]
        opset = helper.make_opsetid('', OPSET)
        graph = helper.make_graph([node], 'certain', ends[:1], ends[1:])
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)

    def lacks(*_, **__):
        raise NotImplementedError('no plugin for primitive \x1b[31m')

    for convert, words in ((certain, 'Not equal'), (lacks, r'primitive \\x1b')):
        monkeypatch.setitem(sys.modules, 'jax2onnx', SimpleNamespace(to_onnx=convert))
        with pytest.raises(UserError, match=words):
            export(run, tmp_path / 'out', 'onnx')
    monkeypatch.setattr(sys.modules[export.__module__], 'MOST_OF_ONNX', 100)
    with pytest.raises(UserError, match='GB'):
        export(run, tmp_path / 'out', 'onnx')
    assert not (tmp_path / 'out').exists()


def test_the_readme_serves_what_launch_predict_says(opened, tmp_path):
    run = opened((8, 8, 3), data__resize='crop', data__size=8)
    (tmp_path / 'in').mkdir()
    paths = photographs(tmp_path / 'in')
    export(run, tmp_path / 'out')
    _, classify, serve = (tmp_path / 'out' / 'README.md').read_text().split('```python\n')
    (tmp_path / 'out' / 'classify.py').write_text(BLOCK + classify.split('```')[0])
    code = serve.split('```')[0]
    assert len([line for line in code.splitlines() if line]) <= 20
    (tmp_path / 'out' / 'serve.py').write_text(code)
    with socket.create_server(('localhost', 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, 'serve.py', str(port)]
    with subprocess.Popen(command, cwd=tmp_path / 'out', stderr=subprocess.DEVNULL) as server:
        try:
            for path, row in zip(paths, predict_files(run, paths), strict=True):
                answer = json.loads(post(port, path.read_bytes()))
                assert list(answer) == run.class_names
                expected = dict(row.classes)
                got = [answer[name] for name in expected]
                np.testing.assert_allclose(got, list(expected.values()), rtol=1e-5)
            with pytest.raises(HTTPError, match='400'):
                post(port, b'no image')
            assert post(port, paths[0].read_bytes())
        finally:
            server.terminate()


def post(port, content):
    """The answer of the server, which may have yet to start."""
    for _ in range(600):
        try:
            with urlopen(f'http://localhost:{port}', content) as answer:
                return answer.read()
        except HTTPError:
            raise
        except URLError:
            time.sleep(0.1)
    raise TimeoutError
