"""Cells that are trained together, as one program on one or more devices."""

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation import cell, workers
from cnn_jax.ablation.cell import train_cells
from cnn_jax.ablation.compiled import compile_structure
from cnn_jax.ablation.plan import plan_of
from cnn_jax.ablation.results import open_store
from cnn_jax.data.batches import Arrays, DeviceBatches
from cnn_jax.train import setup

SMALL = {
    'model.stem_width': 0,
    'model.widths': (4,),
    'model.hidden': (8,),
    'data.batch': 8,
    'train.epochs': 2.0,
    'optimizer.learning_rate': 0.01,
}
CONFIGS = [
    cfg.replace(cfg.Config(), SMALL | {'seed': seed, 'model.dropout': 0.1 * seed, 'loss.l2': 1e-3})
    for seed in range(4)
]


def opened():
    """Description and batches of 40 and 21 random images of three classes."""
    splits = []
    for seed, count in enumerate((40, 21)):
        draw = np.random.default_rng(seed)
        images = draw.integers(0, 256, (count, 8, 8, 1), np.uint8)
        labels = draw.integers(0, 3, count).astype(np.int32)
        splits.append(DeviceBatches(Arrays(images, labels, tuple('abc'), str(seed)), batch=8))
    description = setup.describe(CONFIGS[0], *splits)
    description['preprocessing'] = setup.preprocessing(CONFIGS[0], splits[0], None)
    return description, *splits


def assert_agree(together: int, configs=CONFIGS) -> None:
    description, *splits = opened()
    one, many = (compile_structure(configs[0], description, count) for count in (1, together))
    for config, found in zip(configs, train_cells(configs, many, *splits), strict=True):
        [alone] = train_cells([config], one, *splits)
        assert found['correct'] == alone['correct']
        for one_point, point in zip(alone['curves'], found['curves'], strict=True):
            assert point.pop('split') == one_point.pop('split')
            assert point == pytest.approx(one_point, rel=1e-5, abs=1e-6)
    assert many.compilations() == 1


@pytest.mark.parametrize('together', [4, 5])
def test_together_they_agree_with_alone_to_rounding(together):
    assert_agree(together)


def test_each_has_patience_and_statistics_of_its_own():
    changes = {
        'train.epochs': 5.0,
        'train.patience': 1.0,
        'train.best': 'loss',
        'train.precise_norm': 2,
        'optimizer.learning_rate': 0.1,
    }
    assert_agree(3, [cfg.replace(config, changes) for config in CONFIGS[:3]])


def test_devices_share_the_cells():
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
    environment = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__], check=True, env=environment)


def test_a_diverging_cell_fails_alone():
    wild = cfg.replace(CONFIGS[1], {'optimizer.learning_rate': 1e30})
    description, *splits = opened()
    results = train_cells(
        [CONFIGS[0], wild, CONFIGS[2]], compile_structure(wild, description, 3), *splits
    )
    assert [result['status'] for result in results] == ['done', 'failed', 'done']
    assert 'not finite' in results[1]['reason']


def test_where_memory_is_short_fewer_are_trained_together(monkeypatch, tmp_path):
    widths = []

    def train(configs, compiled, *data):
        widths.append(len(configs))
        if len(configs) > 2:
            raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')
        return train_cells(configs, compiled, *data)

    monkeypatch.setattr(cell, 'train_cells', train)
    module = types.ModuleType('made_up', 'Question?')
    module.__file__ = 'experiments/made_up.py'
    module.ARMS = {'none': {}, 'some': {'model.dropout': 0.1}}
    ledger = open_store(tmp_path, plan_of(module, CONFIGS[0], seeds=5), {'code': 'x'}, {})
    totals = workers.run_missing(ledger, opened(), together=6)
    assert widths == [5, 2, 2, 1, 2, 2, 1]
    assert totals['cells'] == 10
    assert [run.status() for run in ledger.runs] == ['done'] * 10


if __name__ == '__main__':  # by test_devices_share_the_cells
    assert len(jax.devices()) == 4
    assert_agree(6, CONFIGS + CONFIGS[:2])  # on one device two are repeated
