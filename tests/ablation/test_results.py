"""Results on disk: they appear whole, runs are claimed once, nothing incomparable is mixed."""

import subprocess
import sys
import time

import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import make_plan
from cnn_jax.ablation.results import open_store
from cnn_jax.errors import UserError

PROVENANCE = {'code': 'c0de', 'training data': 'da7a', 'jaxlib': '1'}


@pytest.fixture
def opened(tmp_path):
    """Opens the store of an ablation of two arms in one folder."""

    def open_one(seeds=2, provenance=PROVENANCE, command='x', metric='accuracy', **changes):
        config = cfg.replace(cfg.Config(), {k.replace('__', '.'): v for k, v in changes.items()})
        arms = {'plain': {}, 'drop, 0.3/x': {'model.dropout': 0.3}}
        plan = make_plan(arms, config, seeds=seeds, metric=metric)
        return open_store(tmp_path, plan, provenance, {'command': command})

    return open_one


def test_runs_come_seed_by_seed_with_names_of_their_own(opened):
    runs = opened().runs
    assert [(r.seed, r.arm) for r in runs] == [
        (seed, arm) for seed in (0, 1) for arm in ('plain', 'drop, 0.3/x')
    ]
    assert len({r.path for r in runs}) == 4
    assert {r.path.parent.name for r in runs} == {'cells'}


def test_results_are_found_again_and_failed_ones_can_be_repeated(opened):
    store = opened()
    first, second, *_ = store.runs
    store.write(first, {'status': 'done'})
    store.write(second, {'status': 'failed', 'reason': 'why'})
    again = opened()
    assert [r.status() for r in again.runs] == ['done', 'failed', 'missing', 'missing']
    assert first.result()['seed'] == 0
    again.retry_failed()
    assert [r.status() for r in again.runs] == ['done', 'missing', 'missing', 'missing']


def test_a_claimed_run_is_not_claimed_again_until_it_is_released(opened):
    store = opened()
    run, other, done, _ = store.runs
    store.write(done, {'status': 'done'})
    with store.claim(run) as mine, opened().claim(run) as theirs:
        assert mine
        assert not theirs
        with store.claim(other) as another:
            assert another
    with store.claim(run) as mine, store.claim(done) as finished:
        assert mine
        assert not finished


def test_the_claim_of_a_killed_process_is_free(opened, tmp_path):
    store = opened()
    run = store.runs[0]
    lock = tmp_path / 'locks' / f'{run.path.stem}.lock'
    with store.claim(run):
        pass  # makes the folder
    code = (
        'import fcntl, time\n'
        f'file = open({str(lock)!r}, "w"); fcntl.flock(file, fcntl.LOCK_EX)\n'
        'print("locked", flush=True); time.sleep(60)'
    )
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'locked\n'
    with store.claim(run) as mine:
        assert not mine
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with store.claim(run) as mine:
            if mine:
                return
    raise AssertionError('the lock outlived its process')


def test_the_definition_follows_the_last_command_and_no_seed_is_forgotten(opened):
    store = opened(seeds=3, command='first')
    store.write(store.runs[0], {'status': 'done'})
    store = opened(seeds=2, command='second', metric='loss')
    definition = store.definition()
    assert [definition[key] for key in ('command', 'metric', 'seeds')] == [
        'second', 'loss', [0, 1, 2]
    ]  # fmt: skip
    assert opened(seeds=2, command='third', metric='loss').definition() == definition
    assert [r.status() for r in opened(seeds=4).runs].count('done') == 1


@pytest.mark.parametrize(
    ('change', 'difference'),
    [
        ({'train__epochs': 3.0}, "arm 'plain': train.epochs: 10.0 → 3.0"),
        ({'provenance': PROVENANCE | {'code': 'new'}}, 'code: c0de → new'),
        ({'provenance': PROVENANCE | {'training data': 'other'}}, 'training data: da7a → other'),
    ],
)
def test_another_config_data_or_code_is_refused_with_the_difference(opened, change, difference):
    opened()
    with pytest.raises(UserError, match=difference):
        opened(**change)


def test_results_without_their_definition_are_not_mixed_with_new_ones(opened, tmp_path):
    store = opened()
    store.write(store.runs[0], {'status': 'done'})
    (tmp_path / 'ablation.json').unlink()
    with pytest.raises(UserError, match='missing'):
        opened()


def test_a_result_with_one_digit_changed_is_found_out(opened):
    store = opened()
    run = store.runs[0]
    store.write(run, {'status': 'done', 'metrics': {'accuracy': 0.81}})
    run.path.write_text(run.path.read_text().replace('0.81', '0.91'))
    with pytest.raises(UserError, match='damaged'):
        run.result()
