"""The configuration: round trips, hashes, differences, and errors that name the way out."""

import dataclasses
import re

import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from tests.environments import ROOT


def test_json_round_trip_keeps_every_field_and_the_hash():
    config = cfg.replace(cfg.Config(), {'model.widths': (8, 16), 'loss.l2': 5e-4, 'seed': 7})
    again = cfg.from_json(cfg.to_json(config))
    assert again == config
    assert cfg.content_hash(again) == cfg.content_hash(config)


def test_numbers_of_numpy_are_numbers():
    plain = {'seed': 3, 'model.dropout': 0.5, 'model.widths': (4, 8)}
    given = {
        'seed': np.int64(3),
        'model.dropout': np.float32(0.5),
        'model.widths': tuple(np.array([4, 8])),
    }
    config = cfg.validate(cfg.replace(cfg.Config(), given))
    assert cfg.to_json(config) == cfg.to_json(cfg.replace(cfg.Config(), plain))


def test_every_field_is_part_of_the_hash():
    base = cfg.Config()
    other = {
        str: 'other',
        bool: True,
        int: 77,
        float: 0.123,
        tuple[int, ...]: (77,),
        tuple[float, ...]: (0.123,),
        tuple[str, ...]: ('other',),
    }
    for path, field in cfg.fields_by_path(base).items():
        changed = cfg.replace(base, {path: other[field.type]})
        assert cfg.content_hash(changed) != cfg.content_hash(base), path


def test_an_integer_is_accepted_for_a_float_and_hashes_alike():
    a, b = (cfg.replace(cfg.Config(), {'train.epochs': n}) for n in (3, 3.0))
    assert cfg.content_hash(a) == cfg.content_hash(b)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'model.widhts': (1,)}, 'did you mean config.model.widths'),
        ({'model.widths': ('a',)}, 'config.model.widths must be a list of whole numbers'),
        ({'train.epochs': 'ten'}, 'config.train.epochs must be a number'),
        ({'seed': True}, 'config.seed must be a whole number'),
    ],
)
def test_unknown_and_mistyped_fields_are_named(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        cfg.replace(cfg.Config(), changes)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'model.padding': 'SAEM'}, 'did you mean SAME'),
        ({'model.dropout': 1.5}, 'config.model.dropout is 1.5; it must be from 0 to 1'),
        ({'data.batch': 0}, 'config.data.batch is 0; it must be from 1 to 1,048,576'),
        ({'model.dropout': float('nan')}, 'config.model.dropout is nan'),
        ({'data.size': 32}, 'config.data.resize'),
        ({'data.resize': 'crop'}, 'config.data.size'),
        ({'optimizer.accumulate': 3}, 'must divide'),
        ({'optimizer.schedule': 'step'}, 'config.optimizer.boundaries'),
        (
            {'optimizer.schedule': 'step', 'optimizer.boundaries': (5,)},
            'decay_rate is 0; say the factor',
        ),
        ({'train.patience': float('inf')}, 'train.patience is inf; it must be finite'),
        ({'train.ema': 1.0}, 'train.ema is 1.0; it must be from 0'),
        ({'data.batch': 1}, 'make all examples equal'),
        ({'optimizer.name': 'own', 'unfreeze.epochs': 1.0}, 'second phase'),
        ({'train.patience': 1.0, 'train.eval_every': 0.0}, 'needs evaluations'),
        ({'train.patience': 1.0, 'unfreeze.epochs': 1.0}, 'a run of one phase'),
        ({'train.epochs': 0.0}, 'one step at least'),
        ({'train.ema': 0.9, 'train.swa_from': 1.0}, 'both average the weights'),
        ({'train.swa_from': 10.0}, 'nothing would be averaged'),
        ({'augment.erase_least': 0.5}, 'is above config.augment.erase_most'),
    ],
)
def test_validation_says_what_is_wrong_and_what_would_do(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        cfg.validate(cfg.replace(cfg.Config(), changes))


@pytest.mark.parametrize(
    ('changes', 'field'),
    [
        ({'residual': True, 'padding': 'VALID'}, 'residual'),
        ({'stochastic_depth': 0.1}, 'residual'),
        ({'drop_kind': 'gaussian', 'dropout': 1.0}, 'dropout'),
        ({'name': 'vgg16', 'input_noise': 0.1}, 'input_noise'),
        ({'name': 'vgg16', 'dropout': 0.4}, 'dropout'),
        ({'name': 'vgg16', 'residual': True}, 'residual'),
        ({'head_norm': 'ghost', 'ghost_batch': 1}, 'ghost_batch'),
        ({'widths': (8, 0)}, 'widths'),
        ({'hidden': (-4,)}, 'hidden'),
        ({'norm': 'group', 'norm_groups': 5}, 'norm_groups'),
        ({'head_norm': 'group', 'hidden': (12,)}, 'norm_groups'),
        ({'norm': 'ghost', 'ghost_batch': 5}, 'ghost_batch'),
        ({'head_norm': 'instance'}, 'head_norm'),
        ({'renorm_r': 0.5}, 'renorm_r'),
        ({'residual': True, 'stochastic_depth': 0.5}, None),
        ({'drop_kind': 'gaussian', 'dropout': 0.99}, None),
        ({'drop_kind': 'block', 'dropout': 1.0}, None),
        ({'norm': 'ghost', 'head_norm': 'ghost'}, None),
        ({'norm': 'group', 'head_norm': 'group'}, None),
    ],
    ids=str,
)
def test_what_does_not_go_together_names_its_field(changes, field):
    config = cfg.replace(cfg.Config(), {f'model.{name}': v for name, v in changes.items()})
    if field is None:
        cfg.validate(config)
        return
    with pytest.raises(UserError, match=f'config.model.{field}'):
        cfg.validate(config)


def test_every_number_has_a_range_or_choices():
    for path, field in cfg.fields_by_path(cfg.Config()).items():
        if field.type in (int, float):
            assert field.metadata.keys() & {'range', 'choices'}, path


def test_values_and_structure_divide_the_config():
    config = cfg.Config()
    paths = set(cfg.traced_values(config)) | set(cfg.structure(config)) | {'seed'}
    assert paths == set(cfg.fields_by_path(config))
    both = set(cfg.traced_values(config)) & set(cfg.structure(config))
    assert {path: cfg.structure(config)[path] for path in both} == {'loss.own': True}


def test_of_a_switch_only_that_it_is_on_is_structure():
    off, low, high = (
        cfg.structure(cfg.replace(cfg.Config(), {'loss.l1': strength}))
        for strength in (0.0, 1e-5, 1e-3)
    )
    assert low == high == off | {'loss.l1': True}
    assert cfg.traced_values(cfg.replace(cfg.Config(), {'loss.l1': 1e-5}))['loss.l1'] == 1e-5


def test_differences_tell_old_and_new():
    old = cfg.Config()
    new = cfg.replace(old, {'loss.l2': 0.5})
    assert cfg.differences(old, new) == {'loss.l2': (0.0, 0.5)}
    assert cfg.differences(old, dataclasses.replace(old)) == {}


def test_bound_numbers_are_those_given_and_what_is_off_stays_off():
    config = cfg.replace(cfg.Config(), {'loss.l1': 1e-3})
    traced = {path: np.float32(0.5) for path in cfg.traced_values(config)}
    bound = cfg.bind(config, traced)
    for path, value in cfg.to_flat(bound).items():
        if path in traced:
            optional = cfg.fields_by_path(config)[path].metadata.get('optional')
            is_off = bool(optional) and not cfg.get(config, path)
            assert cfg.is_on(value) != is_off, path
            assert value == (0.0 if is_off else 0.5), path
        else:
            assert value == cfg.get(config, path), path


@pytest.mark.parametrize('model', [cfg.Model(), cfg.Model(name='vgg16')])
def test_the_default_of_an_earlier_version_is_that_of_this_one(model):
    now = cfg.Config(model=model)
    then = cfg.replace(now, {'model.cut': 'block5_pool'})
    assert cfg.content_hash(then) == cfg.content_hash(now)
    assert not cfg.differences(then, now)
    cfg.validate(then)
    assert cfg.differences(cfg.replace(now, {'model.cut': 'block4_pool'}), now)


def test_the_page_names_fields_that_exist_and_pictures_that_are_there():
    page = (ROOT / 'docs' / 'regularizers.md').read_text()
    known = cfg.fields_by_path(cfg.Config())
    groups = '|'.join({path.split('.')[0] for path in known if '.' in path})
    named = set(re.findall(rf'`((?:{groups})\.\w+)', page))
    assert named <= set(known)
    assert {path for path in known if path.startswith('augment.')} <= named
    pictures = re.findall(r'\]\((\w+\.png)\)', page)
    assert pictures
    assert all((ROOT / 'docs' / name).is_file() for name in pictures)
