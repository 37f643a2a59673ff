"""The cache is whole or absent, and never trusted unread."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained import cache
from cnn_jax.pretrained.layout import digest
from cnn_jax.pretrained.sources import IMAGENET


@pytest.fixture
def kept(imagenet) -> Path:
    return cache.save(imagenet.params, IMAGENET, 'here')


def test_what_is_saved_is_loaded(kept, cache_folder):
    params, source = cache.load(IMAGENET)
    assert (digest(params), source) == (IMAGENET.digest, 'here')
    assert os.listdir(cache_folder) == [kept.name]


def test_file_says_what_it_is(kept):
    with safe_open(kept, 'numpy') as file:
        metadata = file.metadata()
    assert metadata['preprocessing'] == 'caffe'
    assert metadata['digest'] == IMAGENET.digest
    assert 'CC BY 4.0' in metadata['licence']


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv('CNN_JAX_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache.path(IMAGENET).parent == tmp_path / 'cnn_jax'
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'chosen'))
    assert cache.path(IMAGENET).parent == tmp_path / 'chosen'


def test_empty_cache():
    with pytest.raises(UserError, match='is not there'):
        cache.load(IMAGENET)


@pytest.mark.parametrize('share', [0, 0.5, 0.999])
def test_truncated(kept, share):
    os.truncate(kept, int(kept.stat().st_size * share))
    with pytest.raises(UserError):
        cache.load(IMAGENET)


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_one_flipped_bit(kept, share):
    at = int(kept.stat().st_size * share)
    with kept.open('r+b') as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match='is damaged'):
        cache.load(IMAGENET)


def test_foreign_tensor(kept, imagenet):
    tensors = flatten(imagenet.params)
    save_file(tensors | {'head/logits/bias': tensors['block1_conv1/bias']}, kept)
    with pytest.raises(UserError, match=r'foreign tensors \(head/logits/bias\)'):
        cache.load(IMAGENET)


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_full_disk_leaves_nothing(monkeypatch, imagenet, cache_folder, step):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match='No space left on device; make room, or set CNN_JAX_CACHE'):
        cache.save(imagenet.params, IMAGENET, 'here')
    assert os.listdir(cache_folder) == []


def test_folder_that_cannot_be_made(monkeypatch, tmp_path, imagenet):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'file' / 'cache'))
    with pytest.raises(UserError, match='Not a directory'):
        cache.save(imagenet.params, IMAGENET, 'here')
