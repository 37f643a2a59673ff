"""What is shown of an ablation that runs."""

import io
import types

import pytest
from rich.console import Console

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import plan_of
from cnn_jax.ablation.results import open_store
from cnn_jax.ablation.run import Progress


@pytest.fixture
def ledger(tmp_path):
    """Of two arms and two seeds."""
    module = types.ModuleType('made_up', 'Question?')
    module.__file__ = 'experiments/made_up.py'
    module.ARMS = {'plain': {}, 'drop': {'model.dropout': 0.3}}
    return open_store(
        tmp_path, plan_of(module, cfg.Config(), seeds=2), {'code': 'x'}, {'budgets': {}}
    )


def done(accuracy):
    return {'status': 'done', 'metrics': {'eval': {'accuracy': accuracy}}, 'wall_seconds': 2.0}


def rows(progress):
    """The table's lines, as a terminal of 100 columns shows them."""
    console = Console(file=io.StringIO(), width=100)
    console.print(progress.table())
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_a_line_tells_each_cell_once(ledger, capsys):
    with Progress(ledger, live=False) as progress:
        progress.update()
        capsys.readouterr()
        ledger.write(ledger.runs[0], done(0.9))
        progress.update()
        ledger.write(ledger.runs[1], {'status': 'failed', 'reason': 'why'})
        progress.update()
        progress.update()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith('[1/4] plain, seed 0: accuracy 90.00% (mean of 1: 90.00)  2.0 s, ')
    assert second.startswith('[2/4] drop, seed 0: FAILED: why, ')


def test_the_table_has_running_means_and_paired_differences(ledger):
    plain0, drop0, plain1, drop1 = ledger.runs
    for cell, accuracy in ((plain0, 0.90), (plain1, 0.92), (drop1, 0.95)):
        ledger.write(cell, done(accuracy))
    with ledger.claim(drop0):
        progress = Progress(ledger, live=False)
        _, plain, drop = rows(progress)
    assert plain == ['plain', '2/2', '91.00', '±', '1.41']
    assert drop == ['drop', '1/2', '1', '95.00', '+3.00']
    assert rows(progress)[2] == ['drop', '1/2', '95.00', '+3.00']


def test_what_was_done_before_is_told(ledger, capsys):
    ledger.write(ledger.runs[0], done(0.9))
    with Progress(ledger, live=False):
        pass
    assert '1 of 4 runs were done before' in capsys.readouterr().out
