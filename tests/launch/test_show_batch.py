"""A picture of what the network is shown: the run's own batches, and nothing else happens."""

import numpy as np
import pytest
from PIL import Image

from cnn_jax import config as cfg
from cnn_jax.components import NO_COMPONENTS
from cnn_jax.pretrained.weights import PREPROCESSINGS
from cnn_jax.train import setup
from launch import show_batch

DIGITS = {'data.source': 'digits', 'data.batch': 20}


def columns(first=0, steps=2, count=4, **changes):
    changes = {name.replace('__', '.'): given for name, given in changes.items()}
    config = cfg.validate(cfg.replace(cfg.Config(), DIGITS | changes))
    return show_batch.shown_batches(config, NO_COMPONENTS, first, steps, count)


def test_it_writes_a_picture_and_nothing_else(launch, tmp_path):
    path = tmp_path / 'new' / 'batch.png'
    flags = ('--config=experiments/small.py', '--config.data.source=digits', '--images=3')
    launch('show_batch', *flags, '--steps=2', '--config.augment.mixup=1', f'--out={path}', check=0)
    with Image.open(path) as image:
        assert image.width > image.height > 300
    assert [p.name for p in path.parent.iterdir()] == ['batch.png']


def test_without_changes_the_images_are_shown_as_they_are():
    for column in columns()[0]:
        np.testing.assert_allclose(column['shown'], column['image'] / 255, atol=1e-5)
        assert (column['share'] == 1).all()


def test_a_step_looks_the_same_wherever_the_picture_starts():
    both = columns(first=3, steps=2, augment__crop=1, augment__cutmix=1.0)[0]
    last = columns(first=4, steps=1, augment__crop=1, augment__cutmix=1.0)[0]
    assert [column['step'] for column in both] == [3, 4]
    for name in both[1]:
        np.testing.assert_array_equal(both[1][name], last[0][name])
    assert (both[0]['shown'] != both[1]['shown']).any()


@pytest.mark.parametrize('kind', [*sorted(PREPROCESSINGS), 'standardize'])
def test_every_preparation_is_undone_for_the_picture(kind):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    spec = {'kind': kind, 'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.4], 'channels': 3}
    prepare = setup.preparation(spec)
    back = show_batch.unprepared(np.asarray(prepare(images)), prepare, 3)
    np.testing.assert_allclose(back, images / 255, atol=1e-5)


def test_kept_views_are_shown_as_they_are_trained_on():
    """With two views, steps a whole epoch apart show the same, and those of the next the other."""
    frozen = {'model__name': 'vgg16', 'train__frozen': ('backbone/*',), 'features__views': 2}
    sliced = {'data__train': 'train[:40]', 'data__resize': 'stretch', 'data__size': 32}
    found = {}
    for column in columns(steps=6, count=20, augment__crop=2, **frozen, **sliced)[0]:
        for image, shown in zip(column['image'], column['shown']):
            found.setdefault((column['step'] // 2 % 2, image.tobytes()), set()).add(shown.tobytes())
    assert len(found) == 2 * 40
    assert all(len(each) == 1 for each in found.values())
    assert sum(found[0, key] != found[1, key] for _, key in found) > 40
