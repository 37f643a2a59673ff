"""Fairness and sharing: what an arm may change, and what one compilation serves."""

import json
import types

import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.ablation.cell import train_cells
from cnn_jax.ablation.compiled import compile_structure
from cnn_jax.ablation.plan import plan_of
from cnn_jax.ablation.results import open_store
from cnn_jax.ablation.workers import run_missing
from cnn_jax.data.batches import Arrays, DeviceBatches, with_order
from cnn_jax.train import setup

ARMS = {
    'none': {'model.norm': 'none', 'model.head_norm': 'none', 'model.dropout': 0.0},
    'dropout': {'model.norm': 'none', 'model.head_norm': 'none', 'model.dropout': 0.3},
    'batch norm': {'model.dropout': 0.0},
}


def made_up(seed, count=40):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count).astype(np.int32)
    images = draw.integers(0, 90, (count, 8, 8, 1)) + 70 * labels[:, None, None, None]
    return Arrays(images.astype(np.uint8), labels, tuple('abc'), f'made up {seed}')


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """A finished ablation of three arms and two seeds: ledger, data, totals."""
    module = types.ModuleType('made_up', 'Question?')
    module.__file__ = 'experiments/made_up.py'
    module.ARMS = ARMS
    config = cfg.replace(
        cfg.Config(),
        {
            'model.stem_width': 0,
            'model.widths': (4,),
            'model.hidden': (8,),
            'data.batch': 8,
            'train.epochs': 2.0,
            'optimizer.learning_rate': 0.01,
        },
    )
    plan = plan_of(module, config, seeds=2)
    batches = [DeviceBatches(arrays, batch=8) for arrays in (made_up(0), made_up(1, 21))]
    description = setup.describe(config, *batches)
    description['preprocessing'] = setup.preprocessing(config, batches[0], None)
    ledger = open_store(tmp_path_factory.mktemp('study'), plan, {'code': 'x'}, {})
    totals = run_missing(ledger, (description, *batches))
    return ledger, (description, *batches), totals


def result(cell):
    return {k: v for k, v in cell.result().items() if 'seconds' not in k}


def test_every_cell_is_done_and_each_structure_compiled_once(study):
    ledger, _, totals = study
    assert [cell.status() for cell in ledger.runs] == ['done'] * 6
    assert totals == {'cells': 6, 'compilations': 2}


def test_a_cell_alone_gives_the_bits_it_gave_in_company(study):
    ledger, data, _ = study
    for cell in ledger.runs[3:]:
        config = ledger.plan.config(cell.arm, cell.seed)
        [alone] = train_cells([config], compile_structure(config, data[0]), *data[1:])
        before = result(cell)
        for name in ('metrics', 'curves', 'correct', 'parameters'):
            assert json.loads(json.dumps(alone[name])) == before[name], (cell.arm, name)


def test_finished_cells_are_not_run_again(study):
    ledger, data, _ = study
    totals = run_missing(ledger, data, go_on=lambda: pytest.fail('a run was repeated'))
    assert totals == {'cells': 0, 'compilations': 0}


def test_a_missing_cell_alone_is_run_again_to_the_same_result(study):
    ledger, data, _ = study
    cell = ledger.runs[4]
    before = result(cell)
    cell.path.unlink()
    assert run_missing(ledger, data)['cells'] == 1
    after = result(cell)
    before.pop('compilations'), after.pop('compilations')
    assert after == before


def test_a_diverging_cell_fails_alone_with_its_reason(study, tmp_path):
    ledger, data, _ = study
    module = types.ModuleType('made_up', 'Question?')
    module.__file__ = 'experiments/made_up.py'
    module.ARMS = {'fine': {}, 'wild': {'optimizer.learning_rate': 1e30}}
    config = cfg.replace(ledger.plan.configs['none'], {'optimizer.name': 'sgd'})
    other = open_store(tmp_path, plan_of(module, config, seeds=1), {'code': 'x'}, {})
    run_missing(other, data)
    fine, wild = other.runs
    assert fine.status() == 'done'
    assert wild.status() == 'failed'
    assert 'not finite' in wild.result()['reason']


def test_a_seed_gives_every_arm_the_same_start_and_order(study):
    ledger, data, _ = study
    starts = {}
    for arm in ARMS:
        config = ledger.plan.config(arm, 1)
        compiled = compile_structure(config, data[0])
        starts[arm] = params.flatten(compiled.phases[0].steps.init(1).params)
    for arm in ('dropout', 'batch norm'):
        shared = starts['none'].keys() & starts[arm].keys()
        assert shared == starts['none'].keys()
        for path in shared:
            np.testing.assert_array_equal(starts['none'][path], starts[arm][path], err_msg=path)
    orders = [
        [np.asarray(batch['index']) for _, batch in zip(range(5), stream.train(0))]
        for stream in (with_order(data[1], batch=8, seed=1) for _ in range(2))
    ]
    np.testing.assert_array_equal(*orders)
    other = [
        np.asarray(b['index'])
        for _, b in zip(range(5), with_order(data[1], batch=8, seed=2).train(0))
    ]
    assert not np.array_equal(orders[0], other)


def test_correct_examples_and_accuracy_agree(study):
    ledger, _, _ = study
    for cell in ledger.runs:
        found = result(cell)
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(found['correct']), np.uint8))[:21]
        assert bits.mean() == pytest.approx(found['metrics']['eval']['accuracy'])
        assert found['metrics']['train']['count'] == 40
