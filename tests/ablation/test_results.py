"""Results on disk: they appear whole, runs are claimed once, nothing incomparable is mixed."""

import json
import math
import os

import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation import figures
from cnn_jax.ablation.plan import make_plan
from cnn_jax.ablation.report import LABELS, Ablation
from cnn_jax.ablation.results import open_store, read_results
from cnn_jax.errors import UserError
from cnn_jax.files import read_json, write_json

FACTS = {'command': '', 'manifest': {}, 'budgets': {}}
PROVENANCE = {'code': 'c0de', 'training data': 'da7a', 'jaxlib': '1'}


@pytest.fixture
def opened(tmp_path):
    """Opens the store of an ablation of two arms in one folder."""

    def open_one(seeds=2, provenance=PROVENANCE, command='x', metric='accuracy', **changes):
        config = cfg.replace(cfg.Config(), {k.replace('__', '.'): v for k, v in changes.items()})
        arms = {'plain': {}, 'drop, 0.3/x': {'model.dropout': 0.3}}
        plan = make_plan(arms, config, seeds=seeds, metric=metric)
        return open_store(tmp_path, plan, provenance, FACTS | {'command': command})

    return open_one


def status(run):
    return run.result()['status'] if run.path.exists() else 'missing'


def test_runs_come_seed_by_seed_with_names_of_their_own(opened):
    runs = opened().runs
    assert [(r.seed, r.arm) for r in runs] == [
        (seed, arm) for seed in (0, 1) for arm in ('plain', 'drop, 0.3/x')
    ]
    assert len({r.path for r in runs}) == 4
    assert {r.path.parent.name for r in runs} == {'cells'}


def test_results_are_found_again_and_failed_ones_can_be_repeated(opened, finished):
    store = opened()
    first, second, *_ = store.runs
    store.write(first, finished(0.5))
    store.write(second, {'status': 'failed', 'reason': 'why'})
    again = opened()
    assert [status(r) for r in again.runs] == ['done', 'failed', 'missing', 'missing']
    assert first.result()['seed'] == 0
    again.retry_failed()
    assert [status(r) for r in again.runs] == ['done', 'missing', 'missing', 'missing']


def test_a_claimed_run_is_not_claimed_again_until_it_is_released(opened, finished):
    store = opened()
    run, other, done, _ = store.runs
    store.write(done, finished(0.5))
    with store.claim(run) as mine, opened().claim(run) as theirs:
        assert mine
        assert not theirs
        with store.claim(other) as another:
            assert another
    with store.claim(run) as mine, store.claim(done) as finished:
        assert mine
        assert not finished


def test_the_definition_follows_the_last_command_and_no_seed_is_forgotten(opened, finished):
    store = opened(seeds=3, command='first')
    store.write(store.runs[0], finished(0.5))
    store = opened(seeds=2, command='second', metric='loss')
    definition = store.definition()
    assert [definition[key] for key in ('command', 'metric', 'seeds')] == [
        'second', 'loss', [0, 1, 2]
    ]  # fmt: skip
    assert opened(seeds=2, command='third', metric='loss').definition() == definition
    assert [status(r) for r in opened(seeds=4).runs].count('done') == 1


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


def test_results_without_their_definition_are_not_mixed_with_new_ones(opened, finished, tmp_path):
    store = opened()
    store.write(store.runs[0], finished(0.5))
    (tmp_path / 'ablation.json').unlink()
    with pytest.raises(UserError, match='missing'):
        opened()


@pytest.mark.parametrize('name', ['ablation.json', 'cells/1-0.json'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda path: path.write_text(path.read_text().replace('0', '1', 1)),
        lambda path: path.write_text(json.dumps(read_json(path))),  # without its digest
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b''),
        lambda path: path.write_bytes(bytes(range(256))),
        lambda path: path.write_text('[' * 100_000),
        lambda path: path.write_text('1'),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_file_is_named_and_never_waited_for(ablation, name, damage):
    folder = ablation()
    damage(folder / name)
    with pytest.raises(UserError, match=f'{name} (is damaged|cannot be read)'):
        read_results(folder)


@pytest.mark.parametrize('name', ['ablation.json', 'cells/1-0.json'])
def test_sealed_nonsense_is_refused_or_reported_and_never_a_raw_error(ablation, name, monkeypatch):
    """Every part of a file, and of a part, in turn replaced by each of these, or left out."""
    drawn = {name: {'svg': '<svg width="1" height="1"/>', 'png': b''} for name in LABELS}
    monkeypatch.setattr(figures, 'draw', lambda summary: drawn)
    folder = ablation({'none': 0.0, 'x': 0.1}, seeds=3)
    path, refused = folder / name, 0
    whole = read_json(path)
    parts = [(key,) for key in whole]
    parts += [(a, b) for a in whole if isinstance(whole[a], dict) for b in whole[a]]
    for *outer, last in parts:
        for nonsense in (None, '\x1b', [[1]], {'a': {}}, -1, 1e308, math.nan, ...):
            content = json.loads(json.dumps(whole))
            inside = content[outer[0]] if outer else content
            inside[last] = nonsense
            if nonsense is ...:
                del inside[last]
            write_json(path, content)
            result = Ablation(folder)
            try:
                result.write_report()
                assert repr(result)
            except UserError:
                refused += 1
    assert refused > 50
    write_json(path, whole)
    assert Ablation(folder).table


def test_nothing_is_written_through_a_link(ablation, tmp_path):
    folder = ablation({'none': 0.0, 'x': 0.1}, seeds=2)
    (tmp_path / 'mine').mkdir()
    (folder / 'figures').symlink_to(tmp_path / 'mine')
    with pytest.raises(UserError, match='figures is a link'):
        Ablation(folder).write_report()
    assert not list((tmp_path / 'mine').iterdir())
