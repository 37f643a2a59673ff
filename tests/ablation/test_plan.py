"""What an experiment file says, and what is refused before anything runs."""

import importlib
import types
from pathlib import Path

import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation import plan
from cnn_jax.errors import UserError
from cnn_jax.validation import validate

ARMS = {
    'none': {'model.dropout': 0.0},
    'some': {'model.dropout': 0.3},
    'BN': {'model.norm': 'none'},
}
EXPERIMENTS = Path(__file__).resolve().parents[2] / 'experiments'


def experiment(**content):
    module = types.ModuleType('made_up', content.pop('doc', 'Which one?'))
    module.__file__ = 'experiments/made_up.py'
    module.__dict__.update(content)
    return module


def test_arms_are_the_config_with_their_changes():
    made = plan.plan_of(experiment(ARMS=ARMS, SEEDS=3), cfg.Config(seed=10))
    assert made.baseline == 'none'
    assert made.seeds == (10, 11, 12)
    assert made.configs['some'].model.dropout == 0.3
    assert made.config('BN', 12).seed == 12
    assert made.question == 'Which one?'


def test_arms_that_differ_in_values_share_a_compilation():
    made = plan.plan_of(experiment(ARMS=ARMS), cfg.Config())
    assert plan.by_structure(made) == [['none', 'some'], ['BN']]


def test_a_grid_has_all_combinations_and_the_first_levels_are_the_baseline():
    factors = {
        'dropout': {'off': {'model.dropout': 0.0}, 'on': {'model.dropout': 0.25}},
        'L2': {'no L2': {}, 'L2': {'loss.l2': 5e-4}},
    }
    made = plan.plan_of(experiment(FACTORS=factors), cfg.Config())
    assert list(made.configs) == ['off, no L2', 'off, L2', 'on, no L2', 'on, L2']
    assert made.baseline == 'off, no L2'
    assert made.levels['on, L2'] == {'dropout': 'on', 'L2': 'L2'}
    assert made.factors == {'dropout': ['off', 'on'], 'L2': ['no L2', 'L2']}


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        ({}, 'neither ARMS nor FACTORS'),
        ({'ARMS': {'a': {}, 'b': {'model.dorpout': 0.1}}}, "arm 'b'.*model.dropout"),
        ({'ARMS': {'a': {}, 'b': {'model.dropout': 0.25}}}, "'a' and 'b'.*are the same"),
        ({'ARMS': {'a': {}}, 'METRIC': 'acc'}, "'acc'; it can be accuracy, top5"),
    ],
)
def test_mistakes_in_the_file_are_named(content, sentence):
    with pytest.raises(UserError, match=sentence):
        plan.plan_of(experiment(**content), cfg.Config())


def test_every_experiment_shipped_is_valid():
    for path in EXPERIMENTS.glob('*.py'):
        if path.stem == '__init__':
            continue
        module = importlib.import_module(f'experiments.{path.stem}')
        config = validate(module.get_config())
        assert module.__doc__, path
        if hasattr(module, 'ARMS') or hasattr(module, 'FACTORS'):
            made = plan.plan_of(module, config)
            assert len(made.configs) > 1
            assert f'--config=experiments/{path.stem}.py' in made.question
