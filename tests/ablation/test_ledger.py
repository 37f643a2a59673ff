"""The ledger: results appear whole, cells are claimed once, nothing incomparable is mixed."""

import subprocess
import sys
import time
import types

import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import plan_of
from cnn_jax.ablation.results import open_store
from cnn_jax.errors import UserError

IDENTITY = {'code': 'c0de', 'training data': 'da7a', 'jaxlib': '1'}


@pytest.fixture
def ledger(tmp_path):
    """Opens the ledger of a made-up ablation of two arms in one folder."""

    def make(seeds=2, identity=IDENTITY, command='x', metric='accuracy', **changes):
        module = types.ModuleType('made_up', 'Question?')
        module.__file__ = 'experiments/made_up.py'
        module.ARMS = {'plain': {}, 'drop, 0.3/x': {'model.dropout': 0.3}}
        module.METRIC = metric
        config = cfg.replace(cfg.Config(), {k.replace('__', '.'): v for k, v in changes.items()})
        return open_store(tmp_path, plan_of(module, config, seeds), identity, {'command': command})

    return make


def test_cells_come_seed_by_seed_with_names_of_their_own(ledger):
    cells = ledger().runs
    assert [(c.arm, c.seed) for c in cells] == [
        ('plain', 0), ('drop, 0.3/x', 0), ('plain', 1), ('drop, 0.3/x', 1)
    ]  # fmt: skip
    assert len({c.path for c in cells}) == 4
    assert {c.path.parent.name for c in cells} == {'cells'}
    assert {c.status() for c in cells} == {'missing'}


def test_a_result_is_found_again_and_failed_is_not_done(ledger):
    book = ledger()
    first, second, *_ = book.runs
    book.write(first, {'status': 'done'})
    book.write(second, {'status': 'failed', 'reason': 'why'})
    again = ledger()
    assert [c.status() for c in again.runs] == ['done', 'failed', 'missing', 'missing']
    assert first.result()['seed'] == 0
    again.retry_failed()
    assert [c.status() for c in again.runs] == ['done', 'missing', 'missing', 'missing']


def test_a_claimed_cell_is_not_claimed_again_until_it_is_let_go(ledger):
    book = ledger()
    cell = book.runs[0]
    with book.claim(cell) as mine:
        assert mine
        with ledger().claim(cell) as theirs:
            assert not theirs
        with book.claim(book.runs[1]) as other:
            assert other
    with book.claim(cell) as mine:
        assert mine


def test_a_done_cell_cannot_be_claimed(ledger):
    book = ledger()
    cell = book.runs[0]
    book.write(cell, {'status': 'done'})
    with book.claim(cell) as mine:
        assert not mine


def test_the_claim_of_a_killed_process_is_free(ledger, tmp_path):
    book = ledger()
    cell = book.runs[0]
    lock = tmp_path / 'locks' / f'{cell.path.stem}.lock'
    code = (
        'import fcntl, sys, time\n'
        f'file = open({str(lock)!r}, "w"); fcntl.flock(file, fcntl.LOCK_EX)\n'
        'print("locked", flush=True); time.sleep(60)'
    )
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'locked\n'
    with book.claim(cell) as mine:
        assert not mine
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with book.claim(cell) as mine:
            if mine:
                return
    raise AssertionError('the lock outlived its process')


def test_more_seeds_go_on_with_the_same_results(ledger):
    book = ledger(seeds=1)
    book.write(book.runs[0], {'status': 'done'})
    more = ledger(seeds=3)
    assert [c.status() for c in more.runs].count('done') == 1
    assert len(more.runs) == 6


def test_the_definition_follows_the_last_command_and_no_seed_is_forgotten(ledger):
    ledger(seeds=3, command='first')
    book = ledger(seeds=2, command='second', metric='loss')
    found = book.definition()
    assert (found['command'], found['metric'], found['seeds']) == ('second', 'loss', [0, 1, 2])
    assert ledger(seeds=2, command='third', metric='loss').definition() == found


def test_cells_without_their_definition_are_not_mixed_with_new_ones(ledger, tmp_path):
    book = ledger()
    book.write(book.runs[0], {'status': 'done'})
    (tmp_path / 'ablation.json').unlink()
    with pytest.raises(UserError, match=r'ablation\.json is missing'):
        ledger()


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'train__epochs': 3.0}, "arm 'plain': train.epochs: 10.0 → 3.0"),
        ({'identity': IDENTITY | {'code': 'new'}}, 'code: c0de → new'),
        ({'identity': IDENTITY | {'training data': 'other'}}, 'training data: da7a → other'),
    ],
)
def test_another_config_data_or_code_is_refused_with_the_difference(ledger, change, sentence):
    ledger()
    with pytest.raises(UserError, match=sentence):
        ledger(**change)


def test_a_result_with_one_digit_changed_is_found_out(ledger):
    book = ledger()
    cell = book.runs[0]
    book.write(cell, {'status': 'done', 'metrics': {'accuracy': 0.81}})
    cell.path.write_text(cell.path.read_text().replace('0.81', '0.91'))
    with pytest.raises(UserError, match='is damaged'):
        cell.result()
