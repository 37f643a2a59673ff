"""A cell is the run that launch.train makes of the same config."""

import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation.cell import train_cells
from cnn_jax.ablation.compiled import compile_structure
from cnn_jax.data.batches import Arrays, DeviceBatches, with_order
from cnn_jax.train import loop, setup
from cnn_jax.validation import validate

STRIDED = {'model.stem_width': 0, 'model.widths': (4,), 'augment.crop': 1, 'loss.l2': 1e-3}
FINE_TUNED = {
    'model.name': 'vgg16',
    'model.cut': 'block2_pool',
    'model.head_norm': 'none',
    'train.frozen': ('backbone/*',),
    'unfreeze.epochs': 1.0,
    'unfreeze.frozen': ('backbone/block1*',),
    'unfreeze.learning_rate': 1e-3,
}
IMPATIENT = {
    'train.epochs': 9.0,
    'train.patience': 2.0,
    'train.best': 'loss',
    'train.precise_norm': 2,
    'train.swa_from': 1.0,
    'optimizer.learning_rate': 0.1,
}
CASES = {
    'strided': STRIDED,
    'averaged, and over before its end': STRIDED | IMPATIENT,
    'fine-tuned': FINE_TUNED,
    'head on features': FINE_TUNED | {'unfreeze.epochs': 0.0, 'features.cache': 'always'},
    'head on kept views': FINE_TUNED
    | {'unfreeze.epochs': 0.0, 'features.views': 2, 'augment.flip': True},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'cache'))


def opened(config):
    """Description and batches of 24 and 13 random images of three classes."""
    splits = []
    for seed, count in enumerate((24, 13)):
        draw = np.random.default_rng(seed)
        images = draw.integers(0, 256, (count, 32, 32, 1), np.uint8)
        labels = draw.integers(0, 3, count).astype(np.int32)
        arrays = Arrays(images, labels, tuple('abc'), f'{seed} {count}')
        splits.append(DeviceBatches(arrays, batch=config.data.batch))
    description = setup.describe(config, *splits)
    description['preprocessing'] = setup.preprocessing(config, splits[0], None)
    return description, *splits


@pytest.mark.parametrize('case', CASES)
def test_it_trains_as_launch_train_does(case, tmp_path):
    base = {'seed': 3, 'model.hidden': (8,), 'data.batch': 8, 'train.epochs': 2.0}
    config = validate(cfg.replace(cfg.Config(), base | CASES[case]))
    description, train, evaluation = opened(config)
    [cell] = train_cells([config], compile_structure(config, description), train, evaluation)

    task = setup.make_task(config, description)
    ordered = with_order(train, batch=config.data.batch, seed=config.seed)
    phases, state = setup.open_phases(config, description, task, ordered, evaluation)
    run = loop.fit(config, task, phases, state, tmp_path / 'run', live=False)

    assert run.metrics is not None
    for name in ('loss', 'accuracy', 'calibration_error'):
        assert cell['metrics']['eval'][name] == run.metrics[name], name
    assert cell['steps'] == cell['curves'][-1]['step']
    assert (cell['steps'] < task.ends[-1]) == bool(config.train.patience)
    assert cell['metrics']['train']['count'] == 24
    points = [point['epoch'] for point in cell['curves'] if point['split'] == 'eval']
    assert points == [float(epoch) for epoch in range(1, len(points) + 1)]
