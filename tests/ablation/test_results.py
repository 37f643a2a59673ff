"""Results on disk: they appear whole, runs are claimed once, nothing incomparable is mixed."""

import itertools
import json
import math
import os
import random

import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation import decisions, figures
from cnn_jax.ablation.plan import linear, log, make_plan
from cnn_jax.ablation.report import Ablation
from cnn_jax.ablation.results import AGAIN, FLOOR, FORMAT, open_store, read_store
from cnn_jax.ablation.summary import summary_of
from cnn_jax.errors import UserError
from cnn_jax.files import read_json, write_json

FACTS = {'command': '', 'manifest': {}, 'budgets': {}}
PROVENANCE = {'code': 'c0de', 'training data': 'da7a', 'jaxlib': '1'}
RATE = {'optimizer.learning_rate': log(1e-4, 1e-2)}
ARMS = {'plain': {}, 'drop, 0.3/x': {'model.dropout': 0.3}}


@pytest.fixture
def opened(tmp_path):
    """Opens the store of an ablation of two arms in one folder."""

    def open_one(provenance=PROVENANCE, command='x', change=None, **options):
        config = cfg.replace(cfg.Config(), {'data.validation': 9} | (change or {}))
        plan = make_plan(ARMS, config, **{'seeds': 2, 'floor': False, **options})
        return open_store(tmp_path, plan, provenance, FACTS | {'command': command})

    return open_one


def finished(accuracy=0.5, loss=1.0, split='test'):
    measures = {'accuracy': accuracy, 'loss': loss, 'calibration_error': 0.1, 'count': 8}
    right = np.arange(8) < 8 * accuracy
    return {
        'status': 'done',
        'metrics': {split: measures, 'train': measures, 'validation': measures},
        'correct': np.packbits(right).tobytes().hex(),
        'losses': np.full(8, loss, '<f2').tobytes().hex(),
        'classes': 4,
        'examples': 8,
    }


FAILED = {'status': 'failed', 'reason': 'why', 'classes': 4, 'examples': 8}


def due(store, *kinds):
    return [run for run in decisions.due(store) if run.kind in (kinds or ('replicate',))]


def status(store):
    return [(store.result(run) or {'status': 'missing'})['status'] for run in due(store)]


def test_runs_come_seed_by_seed_with_names_of_their_own(opened):
    store = opened(floor=True)
    assert [(r.seed, r.arm) for r in due(store)] == [(s, arm) for s in (0, 1) for arm in ARMS]
    assert [(r.seed, r.kind) for r in due(store, AGAIN, FLOOR)] == [
        (0, AGAIN),
        (0, FLOOR),
        (1, FLOOR),
    ]
    assert len({r.path for r in decisions.due(store)}) == 7
    assert {r.path.parent.name for r in decisions.due(store)} == {'cells'}


def test_arms_that_look_alike_and_have_one_point_have_results_of_their_own(tmp_path):
    arms = {'узкий': linear(0.2, 0.4), 'широкий': linear(0.1, 0.5)}
    arms = {'plain': {}} | {name: {'model.dropout': each} for name, each in arms.items()}
    config = cfg.replace(cfg.Config(), {'data.validation': 9})
    store = open_store(tmp_path, make_plan(arms, config, trials=1), PROVENANCE, FACTS)
    runs = decisions.due(store)
    assert len({run.path for run in runs}) == len(runs)


def test_results_are_found_again_and_failed_ones_can_be_repeated(opened):
    store = opened()
    first, second, *_ = due(store)
    store.write(first, finished())
    store.write(second, FAILED)
    again = opened()
    assert status(again) == ['done', 'failed', 'missing', 'missing']
    again.retry_failed()
    assert status(opened()) == ['done', 'missing', 'missing', 'missing']


def test_a_claimed_run_is_not_claimed_again_until_it_is_released(opened):
    store = opened()
    run, other, done, _ = due(store)
    store.write(done, finished())
    with store.claim(run) as mine, opened().claim(run) as theirs:
        assert mine
        assert not theirs
        with store.claim(other) as another:
            assert another
    with store.claim(run) as mine, store.claim(done) as whole:
        assert mine
        assert not whole


def test_replicates_are_due_once_the_arms_trials_have_chosen(opened):
    """The least mean loss of the finalists is chosen; a failed trial, or one left out, is not."""
    store = opened(tune=RATE, trials=5, primaries=('loss',))
    first = {'plain': [0.9, None, 0.2, 0.5, 0.3], 'drop, 0.3/x': [0.2, 0.4, 0.6, 0.8, None]}
    later = {'plain': {2: 0.6, 3: 0.4, 4: None}, 'drop, 0.3/x': {0: 0.2, 1: 0.4, 2: 0.1}}
    assert not due(store)
    assert decisions.waiting(store) == 5 + 2 * 9
    for arm in first:
        total = len(decisions.due(store)) + decisions.waiting(store)
        for runs, loss in zip(store.trials(arm), first[arm], strict=True):
            [run] = runs
            store.write(run, FAILED if loss is None else finished(loss=loss))
        assert not store.choice(arm, 'loss')
        assert {n for n, runs in enumerate(store.trials(arm)) if len(runs) > 1} == {*later[arm]}
        assert len(decisions.due(store)) + decisions.waiting(store) == total
        for number, loss in later[arm].items():
            for run in store.trials(arm)[number][1:]:
                store.write(run, FAILED if loss is None else finished(loss=loss))
        assert {run.arm for run in due(store)} == {*ARMS} if arm != 'plain' else {'plain'}
    for arm, number in (('plain', 3), ('drop, 0.3/x', 0)):
        choice = store.choice(arm, 'loss')
        assert choice.trial == number
        assert choice.point == store.plan.points[arm][number]
        rates = [point['optimizer.learning_rate'] for point in store.plan.points[arm]]
        at_edge = rates[number] in (min(rates), max(rates))
        assert choice.at_edge == [*RATE] * at_edge
        chosen = {run.config.optimizer.learning_rate for run in due(store) if run.arm == arm}
        assert chosen == {rates[number]}
    assert store.choice('plain', 'loss').values[1] is None


def test_a_choice_at_an_edge_is_followed_until_it_is_none(opened):
    """Each step is as far as the last two lie apart; what the field cannot hold ends it."""
    store = opened(tune=RATE, trials=4, widen=3, primaries=('loss',))
    best = 0.05  # beyond the range, which ends at 1e-2
    [path] = RATE
    while missing := [run for run in decisions.missing(store) if run.kind == 'trial']:
        assert not store.choice(missing[0].arm, 'loss')
        for run in missing:
            rate = run.config.optimizer.learning_rate
            store.write(run, finished(loss=abs(np.log(rate / best))))
    for arm in ARMS:
        rates = [point[path] for point in store.points(arm)]
        assert rates[:4] == [point[path] for point in store.plan.points[arm]]
        steps = np.diff(np.log(sorted(rates)[-4:]))
        assert np.allclose(steps, steps[0])
        choice = store.choice(arm, 'loss')
        assert choice.point[path] == min(rates, key=lambda rate: abs(np.log(rate / best)))
        assert not choice.at_edge
        assert [len(runs) for runs in store.trials(arm)[4:]] == [4] * (len(rates) - 4)


def test_an_arm_that_alone_is_at_an_edge_is_tuned_to_the_end(opened):
    store = opened(tune=RATE, trials=4, widen=3, primaries=('loss',))
    best = {'plain': 0.05, 'drop, 0.3/x': 1e-3}
    while missing := [run for run in decisions.missing(store) if run.kind == 'trial']:
        for run in missing:
            rate = run.config.optimizer.learning_rate
            store.write(run, finished(loss=abs(np.log(rate / best[run.arm]))))
    assert [len(store.points(arm)) > 4 for arm in ARMS] == [True, False]
    assert {run.arm for run in due(store)} == {*ARMS}


def test_where_every_finalist_fails_the_best_other_trial_is_chosen(opened):
    store = opened(tune=RATE, trials=6, primaries=('loss',))
    for (run,), loss in zip(store.trials('plain'), (None, 1.0, 2.0, 3.0, 9.0, 8.0), strict=True):
        store.write(run, finished(loss=loss) if loss else FAILED)
    for run in decisions.missing(store):
        if run.arm == 'plain':
            store.write(run, FAILED)
    assert store.choice('plain', 'loss').trial == 5


def test_a_replicate_is_known_by_its_point_however_trials_are_numbered(opened):
    store = opened(tune=RATE, trials=4, widen=1, primaries=('loss',))
    while missing := [run for run in decisions.missing(store) if run.arm == 'plain']:
        for run in missing:
            store.write(run, finished(loss=1 / run.config.optimizer.learning_rate))
    choice = store.choice('plain', 'loss')
    assert choice.trial == 4
    run = store.run('replicate', 'plain', 0, 9, choice.point)
    assert store.result(run)
    other = store.run('replicate', 'plain', 0, 1, store.points('plain')[1])
    other.path.write_bytes(run.path.read_bytes())
    with pytest.raises(UserError, match='another run'):
        store.result(other)


def test_no_range_is_widened_beyond_what_its_field_can_hold(opened):
    store = opened(tune={'loss.label_smoothing': linear(0.5, 0.94)}, trials=4, widen=9)
    while missing := [run for run in decisions.missing(store) if run.kind == 'trial']:
        for run in missing:
            store.write(run, finished(loss=1 - run.config.loss.label_smoothing))
    values = [point['loss.label_smoothing'] for point in store.points('plain')]
    assert 4 < len(values) < 9
    assert max(values) < 1


def test_only_undecided_arms_and_their_controls_get_the_replicates_of_the_next_look(tmp_path):
    arms = {'none': {}, 'clear': {'model.dropout': 0.1}, 'unclear': {'model.dropout': 0.2}}
    draw = np.random.default_rng(0)
    plan = make_plan(arms, cfg.Config(), until_decided=True, floor=False, primaries=('loss',))
    store, ended = open_store(tmp_path, plan, PROVENANCE, FACTS), 0
    while missing := decisions.missing(store):
        for run in missing:
            gain = {'none': 0.0, 'clear': -1.0, 'unclear': -0.04}[run.arm]
            store.write(run, finished(loss=2 + gain + draw.normal(0, 0.1)))
        ended += 1
    assert ended > 1
    needed = decisions.replicates(store)
    assert needed['clear'] < needed['unclear'] == needed['none'] == 30
    # Read again, at the end, the looks are what they were.
    assert decisions.replicates(read_store(tmp_path)) == needed
    found = summary_of(open_again(tmp_path))['arms']['clear']['compared']['loss']
    assert (found['verdict'], found['decided']) == ('better', needed['clear'])


def open_again(folder):
    definition = read_json(folder / 'ablation.json')
    counts = {'train': 8, 'pool': 8, 'test': 8, 'validation': 0, 'classes': 4}
    write_json(folder / 'ablation.json', definition | {'counts': counts})
    for path in (folder / 'cells').iterdir():
        checks = dict.fromkeys(('training_loss', 'weight_norm', 'gradient_norm'), 1.0)
        more = {'checks': checks, 'curves': [], 'parameters': 1, 'steps': 1}
        write_json(path, read_json(path) | more)
    return read_store(folder)


def test_the_definition_follows_the_last_command_and_no_look_is_forgotten(opened):
    store = opened(seeds=3, command='first')
    store.write(due(store)[0], finished())
    store = opened(seeds=2, command='second', primaries=('loss',))
    definition = store.definition()
    assert definition['command'] == 'second'
    assert (store.plan.primaries, store.plan.looks) == (('loss',), (3,))
    assert opened(seeds=2, command='third', primaries=('loss',)).definition() == definition
    store = opened(seeds=4)
    assert store.plan.looks == (3, 4)
    assert status(store).count('done') == 1


def test_a_single_replicate_is_no_look(opened):
    assert opened(seeds=1).plan.looks == (1,)
    assert opened(seeds=4).plan.looks == (4,)


@pytest.mark.parametrize(
    ('change', 'difference'),
    [
        ({'change': {'train.epochs': 3.0}}, "arm 'plain': train.epochs: 10.0 → 3.0"),
        ({'change': {'seed': 1}}, 'seed: 0 → 1'),
        ({'provenance': PROVENANCE | {'code': 'new'}}, 'code: c0de → new'),
        ({'provenance': PROVENANCE | {'training data': 'other'}}, 'training data: da7a → other'),
    ],
)
def test_another_config_data_or_code_is_refused_with_the_difference(opened, change, difference):
    opened()
    with pytest.raises(UserError, match=difference):
        opened(**change)


def test_other_ranges_and_trials_are_no_other_ablation(opened):
    store = opened(tune=RATE, trials=2)
    for runs in store.trials('plain'):
        for run in runs:
            store.write(run, finished())
    wider = opened(tune={'optimizer.learning_rate': log(1e-5, 1.0)}, trials=2)
    assert not wider.choice('plain', 'loss')
    assert opened(tune=RATE, trials=2).choice('plain', 'loss')
    assert not opened(tune=RATE, trials=3).choice('plain', 'loss')


def test_results_without_their_definition_are_not_mixed_with_new_ones(opened, tmp_path):
    store = opened()
    store.write(due(store)[0], finished())
    (tmp_path / 'ablation.json').unlink()
    with pytest.raises(UserError, match='missing'):
        opened()


def test_an_ablation_of_an_earlier_version_is_refused(opened, tmp_path):
    path = tmp_path / 'ablation.json'
    opened()
    write_json(path, read_json(path) | {'format': FORMAT - 1})
    for read in (opened, lambda: read_store(tmp_path)):
        with pytest.raises(UserError, match='another version'):
            read()


def targets(folder):
    return folder / 'ablation.json', sorted((folder / 'cells').glob('dropout-[0-9]*'))[0]


@pytest.mark.parametrize('number', [0, 1])
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
def test_a_damaged_file_is_named_and_never_waited_for(ablation, number, damage):
    path = targets(ablation())[number]
    damage(path)
    with pytest.raises(UserError, match=f'{path.name} (is damaged|cannot be read)'):
        Ablation(path.parent if number == 0 else path.parents[1]).summary  # noqa: B018


@pytest.mark.parametrize('number', [0, 1])
def test_sealed_nonsense_is_refused_or_reported_and_never_a_raw_error(
    ablation, number, monkeypatch
):
    """Parts of a file, and of a part, in turn replaced by nonsense, or left out."""
    monkeypatch.setattr(figures, 'draw', lambda summary: {})
    folder = ablation({'none': 0.0, 'dropout': 0.1}, seeds=2)
    path, refused = targets(folder)[number], 0
    whole = read_json(path)
    parts = [(key,) for key in whole]
    parts += [(a, b) for a in whole if isinstance(whole[a], dict) for b in whole[a]]
    damages = itertools.product(parts, (None, '\x1b', [[1]], {'a': {}}, -1, 1e308, math.nan, ...))
    for (*outer, last), nonsense in random.Random(0).sample([*damages], 80):
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
    assert refused > 20
    write_json(path, whole)
    assert Ablation(folder).table


def test_nothing_is_written_through_a_link(ablation, tmp_path):
    folder = ablation({'none': 0.0, 'x': 0.1}, seeds=2)
    (tmp_path / 'mine').mkdir()
    (folder / 'figures').symlink_to(tmp_path / 'mine')
    with pytest.raises(UserError, match='figures is a link'):
        Ablation(folder).write_report()
    assert not list((tmp_path / 'mine').iterdir())
