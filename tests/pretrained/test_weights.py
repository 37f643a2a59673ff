"""Published weights: sources, cache, preprocessing, and their way into a model."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import safe_open
from safetensors.numpy import save_file

from cnn_jax.backbones import CONVOLUTIONS, VGG16
from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import digest
from cnn_jax.pretrained.weights import (
    CAFFE,
    IMAGENET,
    PLAIN,
    PREPROCESSINGS,
    SOURCES,
    TORCH,
    cache_path,
    insert,
    load,
    load_cached,
    save_cached,
)

# Another process that loads from the source on its command line.
LOAD = """
import json, sys
from cnn_jax.fetch import File
from cnn_jax.pretrained.weights import load
print(load(sources={'local': File(**json.loads(sys.argv[1]))}).digest)
"""


@pytest.fixture
def h5_bytes(write, imagenet) -> bytes:
    return write('weights.h5', imagenet.params).read_bytes()


@pytest.fixture
def closed():
    """A source that nobody answers for."""
    return dataclasses.replace(SOURCES['keras'], location='http://127.0.0.1:9/w.h5')


def start(file) -> subprocess.Popen:
    command = [sys.executable, '-c', LOAD, json.dumps(dataclasses.asdict(file))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_next_source_when_one_fails(serve, h5_bytes, closed):
    with pytest.warns(match=r'closed: w.h5 cannot be downloaded \(Connection refused\)'):
        found = load(sources={'closed': closed, 'local': serve(h5_bytes)})
    assert (found.digest, found.source, found.preprocessing) == (IMAGENET.digest, 'local', CAFFE)


def test_next_source_when_one_holds_other_weights(serve, h5_bytes, write, random_params):
    other = serve(write('weights.h5', random_params).read_bytes())
    with pytest.warns(match=f'other weights: their digest is {digest(random_params)}'):
        found = load(sources={'other': other, 'local': serve(h5_bytes)})
    assert found.digest == IMAGENET.digest


def test_cache_answers_from_then_on(serve, h5_bytes, closed):
    load(sources={'local': serve(h5_bytes)})
    found = load(sources={'closed': closed})
    assert (found.digest, found.source) == (IMAGENET.digest, 'local')


def test_damaged_cache_is_replaced(serve, h5_bytes):
    sources = {'local': serve(h5_bytes)}
    load(sources=sources)
    os.truncate(cache_path(), 1_000_000)
    with pytest.warns(match='fetching the weights again'):
        assert load(sources=sources).digest == IMAGENET.digest
    assert load_cached().digest == IMAGENET.digest


def test_nowhere_says_what_was_tried(closed, cache_folder):
    with pytest.raises(
        UserError, match=r'cache: .* does not exist.*; closed: .*; another: .*refused'
    ):
        load(sources={'closed': closed, 'another': closed})
    assert not cache_folder.exists()


def test_two_processes_at_once(serve, h5_bytes, cache_folder):
    source = serve(h5_bytes, together=2)
    processes = [start(source), start(source)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [IMAGENET.digest] * 2
    assert os.listdir(cache_folder) == [cache_path().name]
    assert load_cached().digest == IMAGENET.digest


def test_killed_in_a_download(serve, h5_bytes, cache_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    process = start(serve(h5_bytes, silent_after=10_000_000))
    while not any(file.stat().st_size for file in tmp_path.glob('cnn_jax-*/weights.h5')):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not cache_folder.exists()
    assert load(sources={'local': serve(h5_bytes)}).digest == IMAGENET.digest


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


def test_published_weights_with_red_first(write, imagenet):
    """torchvision's IMAGENET1K_FEATURES: its names, its channel order, Oxford's values."""
    first = imagenet.params['block1_conv1']
    swapped = {'kernel': first['kernel'][:, :, ::-1], 'bias': first['bias']}
    found = load(write('torch.safetensors', imagenet.params | {'block1_conv1': swapped}))
    assert (found.digest, found.preprocessing) == (IMAGENET.digest, CAFFE)


@pytest.mark.parametrize(
    ('kind', 'expected'), [('weights.h5', CAFFE), ('torch.safetensors', TORCH)]
)
def test_unpublished_weights(write, small_params, kind, expected, cache_folder):
    path = write(kind, small_params)
    found = load(path)
    assert (found.digest, found.preprocessing) == (digest(small_params), expected)
    assert found.source == str(path)
    assert 'unknown' in found.licence
    assert not cache_folder.exists()


def test_a_file_says_its_preprocessing(tmp_path, write, small_params):
    path = tmp_path / 'w.safetensors'
    save_file(flatten(small_params), path, metadata={'preprocessing': 'plain', 'licence': 'mine'})
    assert (load(path).preprocessing, load(path).licence) == (PLAIN, 'mine')
    save_file(flatten(small_params), path, metadata={'preprocessing': 'Caffe'})
    for unknown in (path, write('own.safetensors', small_params)):
        with pytest.raises(UserError, match='preprocessing'):
            load(unknown)


# The cache: whole or absent, and never trusted unread.


@pytest.fixture
def cached(imagenet) -> Path:
    save_cached(imagenet.params, 'here')
    return cache_path()


def test_a_copy_is_complete_and_says_what_it_is(cached, cache_folder):
    found = load_cached()
    assert (found.digest, found.source) == (IMAGENET.digest, 'here')
    assert os.listdir(cache_folder) == [cached.name]
    with safe_open(cached, 'numpy') as file:
        metadata = file.metadata()
    assert (metadata['preprocessing'], metadata['digest']) == ('caffe', IMAGENET.digest)
    assert 'CC BY 4.0' in metadata['licence']


@pytest.mark.parametrize('fraction', [0, 0.1, 0.5, 0.9, 0.999])
def test_a_damaged_copy_is_refused(cached, fraction):
    content = bytearray(cached.read_bytes())
    at = int(len(content) * fraction)
    content[at] ^= 1
    for damaged in (content, content[:at]):
        cached.write_bytes(damaged)
        with pytest.raises(UserError):
            load_cached()
    cached.unlink()
    with pytest.raises(UserError, match='does not exist'):
        load_cached()


def test_a_copy_with_a_foreign_tensor_is_refused(cached, imagenet):
    tensors = flatten(imagenet.params)
    save_file(tensors | {'head/logits/bias': tensors['block1_conv1/bias']}, cached)
    with pytest.raises(UserError, match=r'foreign tensors \(head/logits/bias\)'):
        load_cached()


@pytest.mark.parametrize('step', ['fsync', 'replace', 'mkdir'])
def test_a_full_disk_leaves_nothing(monkeypatch, imagenet, cache_folder, step):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match='No space left on device; make room, or set CNN_JAX_CACHE'):
        save_cached(imagenet.params, 'here')
    assert not cache_folder.exists() or os.listdir(cache_folder) == []


def test_weights_that_cannot_be_cached_are_used(serve, h5_bytes, cache_folder):
    cache_folder.write_text('no folder')
    with pytest.warns(match='cannot be written: Not a directory'):
        found = load(sources={'local': serve(h5_bytes)})
    assert (found.digest, found.source) == (IMAGENET.digest, 'local')


# Into a model: every tensor used, every mismatch listed.

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def model_shapes(**options) -> dict:
    return jax.eval_shape(VGG16(**options).init, jax.random.key(0), IMAGE)['params']


def test_whole_backbone(imagenet):
    params = insert(model_shapes(), imagenet)
    given = flatten(imagenet.params)
    assert flatten(params).keys() == given.keys()
    for name, array in flatten(params).items():
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(array, given[name])


def test_layers_beyond_the_cut_are_left_out(imagenet):
    params = insert(model_shapes(cut='block3_conv1'), imagenet)
    assert list(params) == list(CONVOLUTIONS)[:5]


@pytest.mark.parametrize('model', [{'stem': {'kernel': np.zeros(3)}}, {}])
def test_another_model(imagenet, model):
    with pytest.raises(UserError, match='own layers'):
        insert(model, imagenet)


def test_every_mismatch_is_listed(imagenet):
    model = model_shapes()
    del model['block2_conv1']
    model['block1_conv1']['kernel'] = jnp.zeros((3, 3, 1, 64))
    model['block4_conv1']['scale'] = jnp.zeros(3)
    with pytest.raises(UserError) as error:
        insert(model, imagenet)
    both = 'block1_conv1/kernel [3, 3, 1, 64]', 'block1_conv1/kernel [3, 3, 3, 64]'
    for tensor in (*both, 'block2_conv1/kernel', 'block4_conv1/scale'):
        assert tensor in str(error.value)


# Preprocessing, against NumPy in float64 and against Keras.

IMAGES = npst.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.just(3))
)


@settings(deadline=None, max_examples=20)
@given(IMAGES)
def test_formulas(images):
    x = images.astype(np.float64)
    torch = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    caffe = x[..., ::-1] - [103.939, 116.779, 123.68]
    np.testing.assert_allclose(TORCH(images), torch, atol=1e-6)
    np.testing.assert_allclose(CAFFE(images), caffe, atol=1e-5)
    np.testing.assert_allclose(PLAIN(images), x / 255, atol=1e-7)


@pytest.mark.parametrize(('ours', 'mode'), [(CAFFE, 'caffe'), (TORCH, 'torch')])
def test_agrees_with_keras(ours, mode):
    from keras.applications import imagenet_utils

    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    theirs = imagenet_utils.preprocess_input(images.astype(np.float32), mode=mode)
    np.testing.assert_allclose(ours(images), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('preprocessing', PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_grey_is_repeated_and_tracing_changes_nothing(preprocessing):
    grey = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 1), np.uint8)
    rgb = preprocessing(np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(preprocessing(grey), rgb)
    traced = jax.jit(preprocessing)(grey)
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, rgb, rtol=1e-6, atol=1e-6)
