"""The plan of an ablation, and what is refused before anything is trained."""

import importlib
import json
import math
import types

import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import Plan, by_structure, linear, log, make_plan, plan_of
from cnn_jax.errors import UserError
from tests.environments import ROOT

ARMS = {
    'none': {'model.dropout': 0.0},
    'some': {'model.dropout': 0.3},
    'BN': {'model.norm': 'none'},
}
FACTORS = {
    'dropout': {'off': {'model.dropout': 0.0}, 'on': {'model.dropout': 0.25}},
    'L2': {'no L2': {}, 'L2': {'loss.l2': 5e-4}},
}
TWO = {
    name: {'model.dropout': rate}
    for name, rate in (('a', 0.1), ('a, b', 0.2), ('c', 0.3), ('b, c', 0.4))
}
EXPERIMENTS = ROOT / 'experiments'


def experiment(**content):
    module = types.ModuleType('an_experiment', 'Which one?')
    module.__file__ = 'experiments/an_experiment.py'
    module.__dict__.update(content)
    return module


def test_arms_are_the_config_with_their_changes():
    plan = plan_of(experiment(ARMS=ARMS, SEEDS=3), cfg.Config(seed=10))
    assert plan.baseline == 'none'
    assert plan.seeds == (10, 11, 12)
    assert plan.configs['some'].model.dropout == 0.3
    assert plan.config('BN', 12).seed == 12
    assert plan.question == 'Which one?'


def test_numbers_of_numpy_and_a_single_measure_are_taken():
    arms = {'none': {}, **{f'batch {n}': {'data.batch': n} for n in 2 ** np.arange(6, 8)}}
    plan = plan_of(experiment(ARMS=arms, PRIMARIES='loss'), cfg.Config())
    assert plan.primaries == ('loss',)
    assert plan.to_json()['changes']['batch 64'] == {'data.batch': 64}


def test_arms_that_differ_in_numbers_share_a_compilation():
    assert by_structure(make_plan(ARMS, cfg.Config())) == [['none', 'some'], ['BN']]


def test_a_grid_has_all_combinations_and_the_first_levels_are_the_baseline():
    plan = plan_of(experiment(FACTORS=FACTORS), cfg.Config())
    assert list(plan.configs) == ['off, no L2', 'off, L2', 'on, no L2', 'on, L2']
    assert plan.baseline == 'off, no L2'
    assert plan.levels['on, L2'] == {'dropout': 'on', 'L2': 'L2'}
    assert plan.factors == {'dropout': ['off', 'on'], 'L2': ['no L2', 'L2']}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


HELD_OUT = cfg.Config(data=cfg.Data(validation=50))
RATE = {'optimizer.learning_rate': log(1e-4, 1e-2)}


def test_what_is_tuned_in_all_arms_has_the_same_trials_in_all_and_all_have_as_many():
    arms = {
        'none': {},
        'drop': {'model.dropout': linear(0.0, 0.5)},
        'BN': {'loss.l2': log(1e-6, 1e-2)},
    }
    plan = make_plan(arms, HELD_OUT, tune=RATE, trials=9)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    rates = {
        arm: [point['optimizer.learning_rate'] for point in points]
        for arm, points in plan.points.items()
    }
    assert rates['none'] == rates['drop'] == rates['BN']
    assert len({*rates['none']}) == 9
    for path, each in (('model.dropout', plan.ranges['drop']), ('loss.l2', plan.ranges['BN'])):
        arm = 'drop' if path == 'model.dropout' else 'BN'
        tried = sorted(point[path] for point in plan.points[arm])
        assert each[path].low <= tried[0] < tried[-1] <= each[path].high
    assert plan.config('drop', 3, {'model.dropout': 0.2}).model.dropout == 0.2


def test_an_arm_that_sets_what_is_tuned_keeps_its_value():
    fixed = {'optimizer.learning_rate': 0.1}
    plan = make_plan({'none': {}, 'fixed': fixed}, HELD_OUT, tune=RATE)
    assert plan.ranges['fixed'] == {}
    assert plan.configs['fixed'].optimizer.learning_rate == 0.1


def test_trials_added_keep_those_that_were_made():
    few, many = (make_plan({'a': {}}, HELD_OUT, tune=RATE, trials=n) for n in (4, 7))
    assert many.points['a'][:4] == few.points['a']


def test_until_decided_has_looks_and_controls_are_the_baseline_unless_named():
    plan = plan_of(experiment(ARMS=ARMS, AGAINST={'BN': 'some'}), cfg.Config(), until_decided=True)
    assert plan.looks == (5, 10, 20, 30)
    assert plan.against == {'some': 'none', 'BN': 'some'}


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        ({}, 'neither ARMS nor FACTORS'),
        ({'ARMS': {'a': {}, 'b': {'model.dorpout': 0.1}}}, "arm 'b'.*model.dropout"),
        ({'ARMS': {'a': {}, 'b': {'model.dropout': 0.25}}}, "'a' and 'b'.*are the same"),
        ({'ARMS': {'a': {}, 'b': {'data.train': 'train[:9]'}}}, "arm 'b'.*same images"),
        ({'ARMS': {'a': {}, 'b': {'seed': 7}}}, "arm 'b'.*same seeds"),
        *[({'ARMS': {'a': {}, name: {}}}, 'printed') for name in ('b\n', '\u202eb', '', ' ', 3)],
        ({'ARMS': {'a': {}, '\udcff': {}}}, 'printed'),
        *[({'ARMS': arms}, r'must be \{name') for arms in (['a'], 'a', 3)],
        *[({'ARMS': {'a': {}, 'b': changes}}, "arm 'b'") for changes in (None, 'x', [], {3: 4})],
        *[({'FACTORS': factors}, 'factor') for factors in (['a'], 'a', {3: {}}, {'f': {}})],
        *[({'FACTORS': {'f': each}}, 'factor') for each in ('x', {'a': None}, {3: {}})],
        ({'FACTORS': {'f': TWO, 'g': TWO}}, "two arms .* named 'a, b, c'"),
        ({'ARMS': ARMS, 'METRIC': 'loss'}, 'PRIMARIES'),
        ({'ARMS': ARMS, 'FACTORS': {'f': TWO}}, 'ARMS and FACTORS'),
        *[
            ({'ARMS': ARMS, name: 3}, f'did you mean {near}')
            for name, near in (('SEED', 'SEEDS'), ('Tune', 'TUNE'), ('REGULARIZER', 'REGULARIZERS'))
        ],
        *[({'ARMS': ARMS, 'PRIMARIES': each}, 'measure') for each in (['acc'], '', None, [], 3)],
        *[
            ({'ARMS': ARMS, 'MARGINS': each}, 'margins|measures')
            for each in ({'x': 1}, {'top5': 1})
        ],
        *[
            ({'ARMS': ARMS, 'AGAINST': each}, 'AGAINST')
            for each in ({'x': 'none'}, {'some': 'x'}, {'some': 'some'}, {'none': 'some'})
        ],
        *[({'ARMS': ARMS, 'TRIALS': n}, 'trials') for n in (0, -1, 2.5, '5', True)],
        ({'ARMS': ARMS, 'TUNE': RATE}, 'validation'),
        *[({'ARMS': ARMS, name: 3}, 'tunes nothing') for name in ('TRIALS', 'WIDEN')],
        *[({'ARMS': ARMS, 'TUNE': each}, 'tuned') for each in (3, [1], {'loss.l2': 0.1})],
        *[
            ({'ARMS': ARMS, 'MARGINS': {'loss': each}}, 'margin')
            for each in (-1, 'x', math.nan, 10**400)
        ],
        ({'ARMS': ARMS, 'TUNE': {'model.widths': log(1, 2)}}, 'model.widths'),
        ({'ARMS': ARMS, 'TUNE': {'loss.l3': log(1, 2)}}, 'loss.l3.*not a field'),
        ({'ARMS': {'a': {}, 'b': {'model.dropout': linear(0.0, 2.0)}}}, "arm 'b'.*model.dropout"),
        ({'ARMS': {'a': {}, 'b': {'data.batch': log(8, 64)}}}, 'data.batch'),
        ({'ARMS': {'a': {}, 'b': {'train.patience': 3.0}}}, 'validation'),
        *[({'ARMS': ARMS, 'SEEDS': n}, 'seeds') for n in (0, -1, 2.5, '5', True, None, 10**6)],
    ],
)
def test_mistakes_in_the_file_are_named(content, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_of(experiment(**content), cfg.Config())


@pytest.mark.parametrize('make', [log, linear])
@pytest.mark.parametrize('ends', [(2, 1), (1, 1), (0, math.inf), (math.nan, 1), (-math.inf, 1)])
def test_a_range_goes_up(make, ends):
    with pytest.raises(UserError, match='range'):
        make(*ends)


def test_seeds_end_where_a_config_has_them():
    assert make_plan(ARMS, cfg.Config(seed=2**32 - 2), seeds=2).seeds[-1] == 2**32 - 1
    with pytest.raises(UserError, match='seed'):
        make_plan(ARMS, cfg.Config(seed=2**32 - 2), seeds=3)


def test_every_experiment_shipped_is_valid():
    for path in EXPERIMENTS.glob('[!_]*.py'):
        module = importlib.import_module(f'experiments.{path.stem}')
        config = cfg.validate(module.get_config())
        assert module.__doc__, path
        if hasattr(module, 'ARMS') or hasattr(module, 'FACTORS'):
            plan = plan_of(module, config)
            assert len(plan.configs) > 1
            assert f'--config=experiments/{path.stem}.py' in plan.question
