"""Cached features: the same training, at the cost of the head alone, and never stale."""

import json

import numpy as np
import pytest

from cnn_jax import features
from cnn_jax.errors import UserError

SHAPE = (32, 32, 1)
VGG = {
    'model__name': 'vgg16',
    'model__cut': 'block1_pool',
    'model__head_norm': 'none',
    'train__frozen': ('backbone/*',),
    'train__epochs': 3.0,
    'optimizer__name': 'sgd',
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def lines(small, fit, tmp_path):
    """Trains VGG16 in a new folder and returns the lines of its record."""
    number = iter(range(100))

    def make(count=20, **changes):
        folder = tmp_path / f'run{next(number)}'
        fit(small(**VGG | changes), folder, SHAPE, count)
        return [json.loads(text) for text in (folder / 'metrics.jsonl').read_text().splitlines()]

    return make


def files(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob('features/*/*.npy')}


def test_cached_and_uncached_training_give_the_same_losses(lines, cache):
    cached, uncached = lines(), lines(features__cache='never')
    assert files(cache)
    for a, b in zip(cached, uncached, strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
        assert a['accuracy'] == b['accuracy']


def test_bfloat16_features_stay_close(lines, cache):
    whole, half = lines(), lines(features__dtype='bfloat16')
    sizes = sorted(path.stat().st_size for path in files(cache))
    assert sizes[0] < 0.6 * sizes[-1]
    assert half[-1]['loss'] == pytest.approx(whole[-1]['loss'], rel=0.1)
    assert half[-1]['loss'] != whole[-1]['loss']


def test_the_second_run_computes_nothing(lines, cache, monkeypatch):
    first = lines()
    before = files(cache)

    def refuse(*_):
        raise AssertionError('features were computed again')

    monkeypatch.setattr(features.Extractor, 'compute_batch', refuse)
    assert lines() == first
    assert files(cache) == before


@pytest.mark.parametrize(
    ('changes', 'others'),
    [
        ({'model__cut': 'block1_conv2'}, True),
        ({'seed': 3}, True),  # other random convolutions
        ({'model__dtype': 'bfloat16'}, True),
        ({'features__dtype': 'bfloat16'}, True),
        ({'count': 21}, True),  # other data
        ({'optimizer__learning_rate': 0.5}, False),
        ({'data__batch': 4}, False),
    ],
    ids=str,
)
def test_what_the_features_depend_on_and_nothing_else_is_in_their_key(
    lines, cache, changes, others
):
    lines()
    before = files(cache)
    lines(**changes)
    assert len(files(cache)) == (1 + others) * len(before)


def test_killed_in_the_middle_it_goes_on_with_the_next_piece(lines, cache, monkeypatch):
    monkeypatch.setattr(features, 'SHARD', 8)
    compute, calls = features.Extractor.compute_batch, []

    def die_at_the_third(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, *arguments)

    monkeypatch.setattr(features.Extractor, 'compute_batch', die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        lines()
    kept = files(cache)
    assert len(kept) == 2
    monkeypatch.setattr(features.Extractor, 'compute_batch', compute)
    again = lines()
    assert kept.items() <= files(cache).items()
    monkeypatch.setattr(features, 'SHARD', 256)
    assert again == lines()


CUT = {  # by a power cut
    'one bit': lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    'zeros in the middle': lambda content: content[:4000] + bytes(4096) + content[8096:],
    'zeros at the end': lambda content: content[:-4096] + bytes(4096),
    'half': lambda content: content[: len(content) // 2],
    'empty': lambda content: b'',
}


def test_a_damaged_file_is_computed_again(lines, cache):
    first = lines()
    whole = {path: path.read_bytes() for path in files(cache)}
    for damage in CUT.values():
        for path, content in whole.items():
            path.write_bytes(damage(content))
        assert lines() == first
        assert {path: path.read_bytes() for path in files(cache)} == whole


def test_augmentation_needs_a_number_of_views_or_images(lines, cache):
    augmented = {'augment__flip': True, 'augment__crop': 2}
    lines(**augmented)
    assert not files(cache)
    with pytest.raises(UserError, match='number of augmented views'):
        lines(**augmented, features__cache='always')
    lines(**augmented, features__views=3)
    assert len(files(cache)) == 3 + 1
    with pytest.raises(UserError, match='precise_norm takes statistics of images as they are'):
        lines(**augmented, features__views=3, train__precise_norm=2)


def test_views_take_turns_by_epoch(lines):
    still = {'model__head_dropout': 0.0, 'optimizer__learning_rate': 0.0, 'data__batch': 10}

    def losses(views):
        run = lines(features__views=views, augment__crop=8, **still)
        return [line['loss'] for line in run if line['split'] == 'train']

    first, second, third = losses(1)
    assert first == pytest.approx(second, rel=1e-5) == pytest.approx(third, rel=1e-5)
    first, second, third = losses(2)
    assert first == pytest.approx(third, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-3)


def test_features_too_large_for_memory_are_read_batch_by_batch(lines):
    assert lines(data__memory_gb=1e-9, data__stream='never') == lines()


def test_always_refuses_a_network_without_a_frozen_backbone(lines):
    with pytest.raises(UserError, match='the backbone is trained'):
        lines(train__frozen=(), features__cache='always')
    strided = {'model__name': 'strided_net', 'model__cut': 'block5_pool'}
    with pytest.raises(UserError, match='only vgg16'):
        lines(train__frozen=(), features__cache='always', **strided)


@pytest.mark.parametrize('mix', ['mixup', 'cutmix'])
def test_mixed_images_have_no_features_of_their_own(lines, cache, mix):
    with pytest.raises(UserError, match='mixes the images of each batch'):
        lines(**{f'augment__{mix}': 0.5}, features__views=2, features__cache='always')
    lines(**{f'augment__{mix}': 0.5}, features__views=2)
    assert not files(cache)


def test_a_second_phase_that_unfreezes_trains_on_images(lines, cache):
    run = lines(unfreeze__epochs=1.0, unfreeze__frozen=('*block1_conv1/*',))
    assert files(cache)
    assert run[-1]['epoch'] == 4.0
    assert np.isfinite(run[-1]['loss'])
