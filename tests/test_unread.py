"""The law that no setting is without effect in silence, over all fields of the configuration.

A field that is not at its default changes what a step computes, or is refused, or is told by
`config.unread`; and what is told changes nothing.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from cnn_jax import config as cfg
from cnn_jax.components import from_objects
from cnn_jax.errors import UserError
from cnn_jax.train import setup
from cnn_jax.train.program import begin_phase, make_program, state_maker, traced_values
from cnn_jax.train.step import train_step
from tests.train.conftest import gradient_step

FIELDS = cfg.fields_by_path(cfg.Config())
# What a step does not compute with: read where images, weights and features are opened, or by the
# loop around the steps, which have tests of their own.
HOST = {path for path in FIELDS if path.startswith(('data.', 'features.'))} | {
    *('seed', 'own', 'model.weights', 'train.epochs', 'train.eval_every', 'train.threads'),
    *('train.checkpoint_every', 'train.keep', 'train.best', 'train.patience', 'train.trials'),
    'loss.class_weights',
}
SMALL = {'model.stem_width': 0, 'model.widths': (8,), 'model.hidden': (8,), 'data.batch': 4}
BARE = {'model.hidden': (), 'model.norm': 'none', 'model.dropout': 0.0}
BASES = {
    'plain': {'model.head_dropout': 0.0, 'model.dropout': 0.0},
    'bare': BARE,
    'rich': {
        **{'model.stem_width': 4, 'model.residual': True, 'model.drop_kind': 'block'},
        **{'model.norm': 'ghost', 'model.head_norm': 'renorm', 'model.ghost_batch': 2},
    },
    'augmented': BARE | {'augment.erasing': 0.5, 'augment.randaugment': 9.0},
    'penalized': {
        **{'model.norm': 'none', 'model.head_norm': 'none', 'model.dropout': 0.0},
        **{'loss.l1': 0.1, 'loss.l2': 0.1, 'loss.l2_sp': 0.1, 'optimizer.max_norm': 1.0},
        **{'loss.orthogonality': 0.1, 'loss.activity_l1': 0.1, 'optimizer.weight_decay': 0.1},
        **{'optimizer.schedule': 'inverse_time', 'optimizer.decay_rate': 0.5},
    },
    'sgd': {
        **{'model.norm': 'group', 'optimizer.name': 'sgd', 'optimizer.schedule': 'step'},
        **{'optimizer.boundaries': (1.0,), 'optimizer.decay_rate': 0.5},
    },
    'optax': {'optimizer.name': 'lion'},
    'phases': {
        **{'model.name': 'vgg16', 'model.cut': 'block2_pool', 'model.head_norm': 'none'},
        **{'train.frozen': ('backbone/*',), 'unfreeze.epochs': 1.0},
        **{'unfreeze.frozen': ('backbone/block1_conv1*',)},
    },
}
OTHERS = {
    **{'model.cut': 'block1_pool', 'optimizer.name': 'adamax', 'optimizer.arguments': ('b1=0.5',)},
    **{'train.frozen': ('*bias',), 'unfreeze.frozen': ('backbone/block1*',)},
    **{'model.outputs': 1, 'train.swa_from': 0.5, 'augment.erase_least': 0.1},
    **{'model.norm': 'renorm', 'model.head_norm': 'renorm', 'model.head_dropout': 0.25},
    **{'augment.randaugment_operations': 3},
}


def base(name):
    config = cfg.Config()
    if BASES[name].get('model.name') == 'vgg16':
        return cfg.validate(
            cfg.replace(config, {'model.hidden': (8,), 'data.batch': 4} | BASES[name])
        )
    return cfg.validate(cfg.replace(config, SMALL | BASES[name]))


def changed(config, path):
    """The config with another value in one field; raises where that is refused."""
    field, value = FIELDS[path], cfg.get(config, path)
    if path in OTHERS:
        other = OTHERS[path]
    elif 'choices' in field.metadata:
        other = next(each for each in field.metadata['choices'] if each not in (value, cfg.OWN))
    elif field.type is bool:
        other = not value
    elif field.type in (int, float):
        low, high = field.metadata['range']
        other = field.type(
            next(x for x in (2, 4, 0.5, low, high) if low <= x <= high and x != value)
        )
    else:
        item = get_args(field.type)[0]
        other = ('*conv1*',) if item is str else (item(16),)
    return cfg.validate(cfg.replace(config, {path: other}))


def side_of(config):
    return 32 if config.model.name == 'vgg16' else 16


def last_phase(config):
    """The program of the last phase and the function that draws its first state."""
    description = {
        'train': {'count': 64},
        'class_names': ['a', 'b'],
        'image_shape': [side_of(config), side_of(config), 3],
        'preprocessing': {
            'kind': 'standardize',
            'mean': [0.5] * 3,
            'std': [1.0] * 3,
            'channels': 3,
        },
    }
    spec = setup.make_spec(config, description)
    first, *later = (make_program(config, spec, phase) for phase in range(len(spec.phase_ends)))

    def draw():
        return functools.reduce(
            lambda state, program: begin_phase(program, state), later, state_maker(first)(0)
        )

    return [first, *later][-1], draw


def batch_of(config):
    n, side = config.data.batch, side_of(config)
    image = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    label = np.arange(n, dtype=np.int32)
    return {'image': image, 'label': label % 2, 'index': label, 'mask': label >= 0}


TRACED = {}


def step(config, function):
    """What a function of the last phase's step computes, and the traced fields that it uses.

    Configs of one structure share their program (as `tests.train.test_step` holds), so one trace.
    """
    key = function, str(cfg.structure(config))
    if key not in TRACED:
        program, draw = last_phase(config)
        values = traced_values(config)
        with jax.disable_jit():  # the draw has compiler options, which inner functions may not have
            shapes = jax.eval_shape(draw)
        trace = jax.make_jaxpr(functools.partial(function, program))
        closed = trace(shapes, batch_of(config), values)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        names = sorted(values)  # in which order JAX flattens them, behind the others
        used = {name for name, u in zip(names, used[-len(names) :]) if u}
        TRACED[key] = f'{jaxpr} {[str(jnp.asarray(x)) for x in closed.consts]} {shapes}', used
    return TRACED[key]


def matters(config, other, path):
    """Whether the step of another config computes otherwise, or with that field."""
    # Nothing of these reaches the optimizer but by the gradients, which are traced sooner.
    early = path.startswith(('model.', 'augment.', 'loss.'))
    function = gradient_step if early else train_step
    program, used = step(other, function)
    if FIELDS[path].metadata.get('traced') and path not in used:
        return False
    return program != step(config, function)[0] or path in used


@functools.cache
def weights(key):
    """The weights after a step of the last phase."""
    config = cfg.from_json(key)
    program, draw = last_phase(config)
    fast = {'xla_backend_optimization_level': 0}
    train = jax.jit(functools.partial(train_step, program), compiler_options=fast)
    state, _ = train(draw(), batch_of(config), traced_values(config))
    return jax.tree.leaves(state.params)


def verdicts(path):
    """Whether a field that is not at its default is told, on bases of both kinds, each proved."""
    found = set()
    for name in BASES:
        config = base(name)
        try:
            other = changed(config, path)
            told = any(phrase.startswith(f'config.{path} is ') for phrase in cfg.unread(other))
            if told in found or cfg.get(other, path) == FIELDS[path].default:
                continue
            compiled_in = matters(config, other, path)
        except UserError:  # refused, by the config or by the program
            continue
        found.add(told)
        if not told:
            assert compiled_in, (name, path)
        elif compiled_in:  # at a strength of 0
            pairs = zip(weights(cfg.to_json(config)), weights(cfg.to_json(other)))
            assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs), (name, path)
    return found


@pytest.mark.parametrize('group', ['model', 'augment', 'loss', 'optimizer', 'train', 'unfreeze'])
def test_a_setting_matters_or_is_refused_or_told(group):
    paths = [path for path in FIELDS if path.startswith(f'{group}.')]
    for path in sorted({*paths} - HOST - {'loss.own', 'model.name'}):
        assert False in verdicts(path), path  # a field that never matters has no place


@pytest.mark.parametrize(
    ('changes', 'path'),
    [
        ({'data.memory_gb': 1.0, 'data.stream': 'never'}, 'data.memory_gb'),
        ({'data.data_dir': 'sets'}, 'data.data_dir'),
        ({'data.max_corrupt': 0.5, 'data.source': 'digits'}, 'data.max_corrupt'),
        ({'augment.saturation': 0.5}, 'augment.saturation'),
    ],
)
def test_what_is_read_outside_the_step_is_told_too(changes, path):
    told = cfg.unread(cfg.replace(cfg.Config(), changes), channels=1)
    assert [phrase.split()[0] for phrase in told] == [f'config.{path}']


@pytest.mark.parametrize('path', ['features.views', 'features.dtype', 'features.cache'])
def test_features_are_refused_where_there_is_no_backbone(path):
    with pytest.raises(UserError, match=path):
        changed(cfg.Config(), path)


def test_an_own_part_is_told_of_what_its_code_does_not_name():
    def model(config, classes):
        return config.model.head_dropout

    config = cfg.replace(
        cfg.Config(),
        {'model.head_dropout': 0.1, 'model.dropout': 0.1, 'optimizer.b1': 0.5, 'optimizer.sam': 1},
    )
    brought = from_objects(model=model, optimizer=type('Own', (), {'update': None})())
    told = [phrase.split()[0] for phrase in brought.unread(config)]
    assert told == ['config.model.dropout', 'config.optimizer.b1']
