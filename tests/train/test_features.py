"""Cached features: the same training, at the cost of the head alone, and never stale."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import features, models, params
from cnn_jax.data.batches import DeviceBatches
from cnn_jax.errors import UserError
from cnn_jax.train import metrics, setup
from cnn_jax.train.fit import fit
from cnn_jax.train.program import make_program, state_maker
from cnn_jax.train.run import load_run
from tests.train.conftest import equal, made_up, make_config, make_data, make_spec, opened

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


@pytest.fixture
def computed(monkeypatch):
    """The numbers of the images whose features were computed, batch by batch."""
    compute, numbers = features.Extractor.compute_batch, []

    def note(self, function, batches, index):
        numbers.append([*dict.fromkeys(index.tolist())])
        return compute(self, function, batches, index)

    monkeypatch.setattr(features.Extractor, 'compute_batch', note)
    return numbers


def files(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob('features/*/*.npy')}


def folders(cache):
    return {path.parent for path in files(cache)}


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


def test_the_second_run_computes_nothing(lines, cache, computed):
    first = lines()
    before = files(cache)
    computed.clear()
    assert lines() == first
    assert files(cache) == before
    assert not computed


@pytest.mark.parametrize(
    ('changes', 'others'),
    [
        ({'model__cut': 'block1_conv2'}, True),
        ({'seed': 3}, True),  # other random convolutions
        ({'model__dtype': 'bfloat16'}, True),
        ({'features__dtype': 'bfloat16'}, True),
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
    assert len(folders(cache)) == 1 + others


def extracted(numbers, view=None, seed=1, **changes):
    """The features of some of a source's images, in this order."""
    config = make_config(**VGG | changes)
    source = made_up(seed, 24, SHAPE)
    batches = DeviceBatches(source, batch=8).at(np.array(numbers))
    data = make_data(config, batches, batches)
    data.description['preprocessing'] |= {'mean': [0.4], 'std': [0.2]}  # not of these images alone
    spec = setup.make_spec(config, data.description)
    state = state_maker(make_program(config, spec))(0)
    facts = data.description['preprocessing']
    extractor = features.Extractor(config, 3, spec.prepare, facts, state.backbone)
    return extractor.extract(batches, view)[np.arange(len(numbers))]


def three(images):
    """Images of one channel as a VGG16 takes them."""
    return jnp.repeat(images.astype(jnp.float32) / 255, 3, axis=-1)


AUGMENTED = {'augment__rotation': 20.0, 'augment__randaugment': 5.0, 'features__views': 1}


@pytest.mark.parametrize(
    ('convolutions', 'dtype'), [('native', 'float32'), ('xla', 'float32'), ('xla', 'bfloat16')]
)
@pytest.mark.parametrize(
    ('name', 'cut'), [('vgg16', 'block5_pool'), ('efficientnet_lite0', 'block4')]
)
def test_an_image_has_the_same_bits_in_every_place_of_a_batch(
    monkeypatch, request, cache, dtype, convolutions, name, cut
):
    """Alone, beside others, first or last, in a full batch and a filled-up one.

    Products of XLA's own round by their place where a processor has no AVX-512.
    """
    if convolutions == 'xla':
        request.getfixturevalue('xla_convolutions')
    monkeypatch.setattr(features, 'PIXELS_PER_BATCH', 8 * 32 * 32)
    options = {'model__name': name, 'model__cut': cut}
    options |= {'features__dtype': dtype, 'model__dtype': dtype}
    orders = [[*range(24)], [*range(23, -1, -1)], [5], [7, 5], [*range(3, 14)]]
    exact = convolutions == 'native' or 'avx512f' in Path('/proc/cpuinfo').read_text()
    rows = {}
    for order in orders:
        shutil.rmtree(cache, ignore_errors=True)
        for number, row in zip(order, extracted(order, **options), strict=True):
            before = rows.setdefault(number, row)
            if exact:
                assert before.tobytes() == row.tobytes()
            rounding = 1e-5 if dtype == 'float32' else 2**-6
            before, row = (each.astype(np.float32) for each in (before, row))
            np.testing.assert_allclose(row, before, rtol=rounding, atol=rounding * before.max())


def test_parts_of_a_set_share_what_they_have_in_common(cache, computed):
    """Folds, subsets and slices, in any order; one more image costs one."""
    extracted([*range(23)])
    assert sum(map(len, computed)) == 23
    computed.clear()
    for part in ([*range(0, 20, 2)], [7, 3], [*range(22, -1, -1)]):
        extracted(part)
    assert not computed
    extracted([*range(24)])
    assert computed == [[23]]
    extracted([*range(24)], seed=2)
    assert sum(map(len, computed)) == 1 + 24


def test_a_view_is_that_of_an_image_at_its_number(cache, computed):
    whole = extracted([*range(12)], 0, **AUGMENTED)
    computed.clear()
    again = extracted([*range(6), *range(11, 5, -1)], 0, **AUGMENTED)
    assert computed == [[*range(6, 12)]]  # which are augmented by other numbers now
    np.testing.assert_array_equal(whole[:6], again[:6])
    for changes in ({'view': 1}, {'view': 0, 'augment__rotation': 21.0}, {'view': 0, 'seed': 2}):
        computed.clear()
        extracted([*range(12)], **AUGMENTED | changes)
        assert sum(map(len, computed)) == 12


def test_killed_in_the_middle_it_goes_on_with_the_next_piece(lines, cache, monkeypatch):
    monkeypatch.setattr(features, 'PER_FILE', 8)
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


@pytest.fixture
def scaled(small, tmp_path):
    """Trains a head on scaled features, as `cnn_jax.fit` does."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (20, *SHAPE), np.uint8), np.arange(20) % 3

    def make(name, **changes):
        config = small(**VGG | {'model__scale_features': True} | changes)
        data = {'train': (images, labels), 'eval': (images, labels)}
        return fit(config, tmp_path / name, **data, say=lambda line: None), images

    return make


@pytest.mark.parametrize('pool', ['flatten', 'average'])
def test_a_scaled_head_reads_features_of_mean_0_and_deviation_1(scaled, tmp_path, pool):
    run, images = scaled('run', model__pool=pool)
    x = run.model.apply(run.variables, run.spec.prepare(images), train=False, method='features')
    x = x.mean(axis=(1, 2), keepdims=True) if pool == 'average' else x
    kept = {'batch_stats': run.variables['batch_stats']['head']['scale']}
    channels = np.asarray(models.Scale().apply(kept, x)).reshape(-1, x.shape[-1])
    varied = x.std(axis=(0, 1, 2)) > 1e-6
    assert varied.sum() > 32
    np.testing.assert_allclose(channels.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(channels.std(axis=0)[varied], 1, rtol=1e-3)
    np.testing.assert_array_equal(load_run(tmp_path / 'run').predict(images), run.predict(images))


def test_scaled_features_give_the_training_of_images(scaled):
    cached, _ = scaled('cached')
    images, _ = scaled('images', features__cache='never')
    losses = [each.curves['train']['loss'] for each in (cached, images)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_augmentation_needs_a_number_of_views_or_images(lines, cache):
    augmented = {'augment__flip': True, 'augment__crop': 2}
    lines(**augmented)
    assert not files(cache)
    with pytest.raises(UserError, match='number of augmented views'):
        lines(**augmented, features__cache='always')
    lines(**augmented, features__views=3)
    assert len(files(cache)) == len(folders(cache)) == 3 + 1
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


def test_mixed_images_have_no_features_of_their_own(lines, cache):
    with pytest.raises(UserError, match='mixes the images of each batch'):
        lines(augment__mixup=0.5, features__views=2, features__cache='always')
    lines(augment__mixup=0.5, features__views=2)
    assert not files(cache)


DEEPER = {
    'model__cut': 'block3_pool',
    'unfreeze__epochs': 2.0,
    'unfreeze__frozen': ('backbone/block[12]*',),
    'unfreeze__learning_rate': 1e-3,
    'optimizer__learning_rate': 1e-4,
}


@pytest.mark.parametrize(
    ('changes', 'cuts'),
    [
        ({}, ['block3_pool', 'block2_pool']),
        ({'augment__crop': 2, 'features__views': 2}, ['block3_pool', 'block2_pool']),
        ({'loss__l2_sp': 0.01, 'train__ema': 0.5}, ['block3_pool', 'block2_pool']),
        ({'loss__activity_l1': 0.01}, ['block3_pool', 'block2_pool']),
        # block3_conv2 and block1_pool are large
        ({'unfreeze__frozen': ('*block[12]*', '*block3_conv[12]/*')}, ['block3_pool', '']),
        ({'unfreeze__frozen': ('*block1*', '*block3*')}, ['block3_pool', '']),
        (
            {'unfreeze__frozen': ('*block1*',), 'features__cache': 'always'},
            ['block3_pool', 'block1_pool'],
        ),
        ({'unfreeze__frozen': ()}, ['block3_pool', '']),
        ({'train__frozen': ('backbone/block[12]*',), 'unfreeze__epochs': 0.0}, ['block2_pool']),
        ({'features__cache': 'never'}, ['', '']),
        ({'loss__input_gradient': 0.1}, ['', '']),
    ],
    ids=str,
)
def test_each_phase_takes_the_features_before_what_it_trains(small, changes, cuts):
    config = small(**VGG | DEEPER | changes)
    programs = setup.make_programs(
        config, make_spec((32, 32, 1), phase_ends=(5, 9)[: len(cuts)], prepare=three)
    )
    assert [program.cached for program in programs] == cuts


@pytest.mark.parametrize(
    'changes',
    [{}, {'loss__activity_l1': 0.01, 'loss__l2_sp': 0.01, 'train__ema': 0.5}],
    ids=['plain', 'regularized'],
)
def test_a_phase_on_features_of_a_middle_layer_is_the_phase_on_images(lines, cache, changes):
    slow = DEEPER | changes
    cached, uncached = lines(**slow), lines(**slow, features__cache='never')
    assert len(folders(cache)) == 2
    assert cached[-1]['epoch'] > 4
    for a, b in zip(cached, uncached, strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)
        assert a['accuracy'] == b['accuracy']


def dying(add):
    """`add` that stops the run at the step `at`."""

    def add_or_die(self, step, sums):
        if step == add_or_die.at:
            raise KeyboardInterrupt
        add(self, step, sums)

    return add_or_die


def test_what_is_frozen_keeps_its_bits_and_a_stopped_run_resumes_in_either_phase(
    small, fit, tmp_path, monkeypatch
):
    config = small(**VGG | DEEPER, train__checkpoint_every=0.4)
    whole = fit(config, tmp_path / 'whole', SHAPE, 20)
    phases = opened(config, SHAPE, 20)[1]
    begun = params.flatten(state_maker(phases[0].program)(config.seed).params)
    ended = params.flatten(whole.state.params)
    for path, leaf in begun.items():
        frozen = path.startswith(('backbone/block1', 'backbone/block2'))
        assert np.array_equal(leaf, ended[path]) == frozen, path
    monkeypatch.setattr(metrics.StepMetrics, 'add', add := dying(metrics.StepMetrics.add))
    for number in (3, 7, 8, 10):  # the first phase ends with step 7
        folder, add.at = tmp_path / f'stopped at {number}', number
        with pytest.raises(KeyboardInterrupt):
            fit(config, folder, SHAPE, 20)
        add.at = None
        assert equal(whole.state, fit(config, folder, SHAPE, 20).state)
