"""The launcher, run as a user runs it."""

import subprocess
import sys

import pytest

from cnn_jax.pretrained.formats import digest
from cnn_jax.pretrained.weights import IMAGENET, cache_path, load_cached, save_cached


@pytest.fixture
def launch():
    """`launch(arguments)`: the finished process."""

    def launch(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, '-m', 'launch.fetch_weights', *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return launch


def test_published_weights_from_a_file_are_kept(launch, onnx_file):
    done = launch(f'--source={onnx_file}')
    assert done.returncode == 0, done.stderr
    assert str(cache_path()) in done.stdout
    for part in (IMAGENET.digest, 'caffe', 'CC BY 4.0', 'Simonyan', '16 tensors'):
        assert part in done.stdout
    assert load_cached().digest == IMAGENET.digest


def test_cached_weights_need_no_network(launch, imagenet):
    save_cached(imagenet.params, 'another machine')
    done = launch()
    assert done.returncode == 0, done.stderr
    assert 'another machine' in done.stdout


def test_weights_of_ones_own_are_reported_and_not_kept(launch, write, random_params):
    done = launch(f'--source={write("torch.safetensors", random_params)}')
    assert done.returncode == 0, done.stderr
    assert digest(random_params) in done.stdout
    assert 'not published' in done.stdout
    assert not cache_path().exists()


def test_a_mistake_is_one_sentence(launch):
    done = launch('--source=absent.h5')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.splitlines() == [
        'error: absent.h5 cannot be read: No such file or directory; check the path'
    ]
