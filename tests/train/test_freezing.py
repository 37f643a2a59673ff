"""Frozen means: not differentiated, no optimizer memory, no decay, no drift, bit for bit equal."""

from collections.abc import Callable
from functools import partial

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from cnn_jax import params
from cnn_jax.errors import UserError
from cnn_jax.freezing import MODES, check_statistics, freeze
from cnn_jax.train import step
from cnn_jax.train.program import parameter_table
from tests.train.conftest import begin, compiled, equal, gradient_step, make_batch, make_config

NORMED = {'train__frozen': ('block1_*',)}
VGG = {
    'model__name': 'vgg16',
    'train__frozen': ('backbone/*',),
    'model__cut': 'block1_pool',
    'model__head_norm': 'none',
}
EVERYTHING = {
    'optimizer__weight_decay': 0.1,
    'loss__l2': 0.1,
    'loss__l2_on': ('*/kernel',),
    'optimizer__clip_norm': 0.5,
    'train__ema': 0.9,
    'optimizer__accumulate': 2,
}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def weights():
    """A frozen backbone with a zero of each sign, and a head."""
    kernel = jnp.array([[-0.0, 0.0, 1.5], [2.0, -3.0, 4.0]])
    return {'backbone': {'kernel': kernel}, 'head': {'kernel': jnp.ones((3, 2))}}


@pytest.mark.parametrize('wrap', [dict, flax.core.freeze, lambda tree: [tree, {'a': tree}]])
def test_freeze_gives_no_memory_no_update_and_no_decay(wrap):
    tree, rule = wrap(weights()), optax.adamw(0.1, weight_decay=0.5)
    tx = freeze(rule, '*backbone/*')
    is_frozen = params.map_paths(lambda path, _: 'backbone' in path, tree)
    labels = jax.tree.map(lambda frozen: 'no' if frozen else 'yes', is_frozen)
    state = tx.init(tree)
    reference = optax.partition({'yes': rule, 'no': optax.set_to_zero()}, labels).init(tree)
    assert params.nbytes(state) == params.nbytes(reference) < params.nbytes(rule.init(tree))
    moved = tree
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, tree), state, moved)
        moved = optax.apply_updates(moved, updates)
    for frozen, a, b in zip(*map(jax.tree.leaves, (is_frozen, tree, moved))):
        assert (bits(a) == bits(b)) == frozen


def test_freeze_is_an_optimizer_of_a_train_state():
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    x = jnp.ones((4, 3))
    tree = net.init(jax.random.key(0), x)['params']
    tx = freeze(optax.adamw(0.1), 'layers_0/*')
    state = TrainState.create(apply_fn=net.apply, params=tree, tx=tx)

    @jax.jit
    def train(state):
        def loss(tree):
            return jnp.sum(jnp.square(state.apply_fn({'params': tree}, x) - 1))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    after = train(train(state)).params
    assert bits(after['layers_0']) == bits(tree['layers_0'])
    assert not np.array_equal(after['layers_2']['kernel'], tree['layers_2']['kernel'])
    moments = 2 * params.nbytes(tree['layers_2'])
    assert moments <= params.nbytes(state.opt_state) <= moments + 16  # and counters


@pytest.mark.parametrize(
    ('patterns', 'sentence'),
    [('bakcbone/*', 'matches no parameter'), (('head/*', 'x'), "'x'"), ('*', 'every parameter')],
)
def test_patterns_that_make_no_sense_are_refused(patterns, sentence):
    with pytest.raises(UserError, match=sentence):
        freeze(optax.sgd(0.1), patterns).init(weights())


@pytest.mark.parametrize(('name', 'moments'), [('sgd', 1), ('adam', 2), ('adamw', 2)])
@pytest.mark.parametrize(('changes', 'shape'), [(NORMED, (8, 8, 1)), (VGG, (32, 32, 3))])
def test_frozen_leaves_cost_no_memory_in_a_run(changes, shape, name, moments):
    program, state, _ = begin(make_config(optimizer__name=name, **changes), shape)
    learned, fixed = params.partition(state.params, program.trainable)
    assert fixed
    counters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0)
    assert params.nbytes(state.opt_state) == moments * params.nbytes(learned) + counters
    assert counters <= 8


@pytest.mark.parametrize(
    ('changes', 'shape', 'optimizer'),
    [
        (NORMED, (8, 8, 1), 'sgd'),
        (NORMED | EVERYTHING, (8, 8, 1), 'sgd'),
        (NORMED | EVERYTHING, (8, 8, 1), 'adamw'),
        (VGG | EVERYTHING, (32, 32, 3), 'adamw'),
    ],
    ids=['plain', 'sgd', 'adamw', 'vgg16'],
)
def test_frozen_leaves_keep_their_bits_in_a_run(changes, shape, optimizer):
    program, first, values = begin(make_config(optimizer__name=optimizer, **changes), shape)
    flat = params.flatten(first.params)
    frozen = next(path for path in flat if path.endswith('bias') and path not in program.trainable)
    flat[frozen] = -jnp.zeros_like(flat[frozen])
    first = first.replace(params=params.unflatten(flat))
    train, last = compiled(program), first
    for number in range(2):
        last, _ = train(last, make_batch(number, shape=shape), values)
    before, after = params.flatten(first.params), params.flatten(last.params)
    for path, leaf in after.items():
        assert (bits(leaf) == bits(before[path])) == (path not in program.trainable), path
    before, after = params.flatten(first.batch_stats), params.flatten(last.batch_stats)
    for path, leaf in after.items():
        assert (bits(leaf) == bits(before[path])) == path.startswith('block1_'), path
    assert set(last.averaged) == (set(program.trainable) if 'train__ema' in changes else set())


def test_the_table_says_what_is_trained_and_decayed():
    changes = NORMED | {'loss__l2': 0.1, 'optimizer__weight_decay': 0.1}
    program, state, _ = begin(make_config(**changes))
    rows = {line.split()[0]: line.split()[1:] for line in parameter_table(program).splitlines()}
    for path, leaf in params.flatten(state.params).items():
        shape, count, kind, *decay = rows[path]
        assert (shape, count) == ('×'.join(map(str, leaf.shape)), f'{leaf.size:,}')
        assert (kind == 'trained') == (path in program.trainable)
        assert ('l2' in decay) == (path in program.acted_on['loss.l2_on'])
        assert ('weight_decay' in decay) == (path in program.acted_on['optimizer.decay_on'])
    for kind, part in zip(('trained', 'frozen'), params.partition(state.params, program.trainable)):
        assert rows[kind][0] == f'{sum(leaf.size for leaf in part.values()):,}'


def test_clipping_sees_only_the_trained():
    norms = []
    for changes in ({}, NORMED):
        program, state, values = begin(make_config(**changes))
        gradients, _, sums = compiled(program, gradient_step)(state, make_batch(), values)
        assert set(gradients) == set(program.trainable)
        norms.append(float(sums['gradient_norm']))
    assert norms[0] > norms[1] > 0


@pytest.mark.usefixtures('xla_convolutions')
def test_there_is_no_backward_pass_through_a_frozen_backbone():
    def flops(program, function, state, values):
        lowered = compiled(program, function).lower(state, make_batch(shape=(32, 32, 3)), values)
        return lowered.compile().cost_analysis()['flops']

    frozen, *arguments = begin(make_config(**VGG), (32, 32, 3))
    forward = flops(frozen, step.eval_step, *arguments)
    assert flops(frozen, step.train_step, *arguments) < 1.1 * forward
    whole, *arguments = begin(make_config(**VGG | {'train__frozen': ()}), (32, 32, 3))
    assert flops(whole, step.train_step, *arguments) > 2.5 * forward


class Layers(nn.Module):
    """Dense, batch normalization and dropout of Flax, in the ways in which these are told."""

    told: str = 'keyword'
    train: bool | None = None

    @nn.compact
    def __call__(self, x, train=None):
        train = self.train if train is None else train
        x = nn.Dense(4)(x)
        if self.told == 'positional':
            return nn.Dropout(0.5)(nn.BatchNorm()(x, not train), not train)
        if self.told == 'keyword':
            x = nn.BatchNorm()(x, use_running_average=not train)
            return nn.Dropout(0.5)(x, deterministic=not train)
        return nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(not train)(x))


class Block(nn.Module):
    """A layer that draws random numbers itself; subclasses name the mode."""

    outputs: int = 4

    @nn.compact
    def compute(self, x, noisy):
        x = nn.Dense(self.outputs)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not noisy)(x)
        return x + jax.random.normal(self.make_rng('dropout'), x.shape) if noisy else x


class Train(Block):
    def __call__(self, x, train=True):
        return self.compute(x, train)


class Training(Block):
    def __call__(self, x, training=True):
        return self.compute(x, training)


class IsTraining(Block):
    def __call__(self, x, is_training=True):
        return self.compute(x, is_training)


class Deterministic(Block):
    def __call__(self, x, deterministic=False):
        return self.compute(x, not deterministic)


class UseRunningAverage(Block):
    def __call__(self, x, use_running_average=False):
        return self.compute(x, not use_running_average)


class Stubborn(Block):
    def __call__(self, x, train=True):
        return self.compute(x, noisy=True)


class Drifting(nn.Module):
    """Moves a statistic in training, whatever it is told."""

    @nn.compact
    def __call__(self, x, train=True):
        mean = self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1])
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(axis=0)
        return nn.Dense(4)(x - mean.value)


NAMED = dict(zip(MODES, (Train, Training, IsTraining, Deterministic, UseRunningAverage)))


class Net(nn.Module):
    """A backbone made and called as a test says, and a head with a norm of its own."""

    classes: int
    make: Callable
    call: Callable

    @nn.compact
    def __call__(self, x, train):
        backbone = self.make(name='backbone')
        x = self.call(backbone, x.reshape(len(x), -1), train)
        x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
        return nn.Dense(self.classes, name='head')(x)


def begin_foreign(make, call, **changes):
    def model(config, classes):
        return Net(classes, make, call)

    return begin(make_config(**changes), shape=(2, 2, 1), model=model)


CASES: dict[str, tuple[Callable, Callable]] = {
    'keywords': (Layers, lambda block, x, train: block(x, train=train)),
    'positions': (partial(Layers, 'positional'), lambda block, x, train: block(x, train)),
    'attributes': (partial(Layers, 'attribute'), lambda block, x, train: block(x, train)),
    'own attribute': (partial(Layers, 'keyword', True), lambda block, x, train: block(x)),
}
for name, kind in NAMED.items():
    CASES[f'{name} by keyword'] = (
        kind,
        lambda block, x, train, name=name: block(x, **{name: train != MODES[name]}),
    )
    CASES[f'{name} by position'] = (
        kind,
        lambda block, x, train, name=name: block(x, train != MODES[name]),
    )
    CASES[f'{name} by default'] = (kind, lambda block, x, train: block(x))


def passes(program, state):
    """Two passes in training with other random numbers."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    images = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 2, 1)), jnp.float32)
    keys = map(jax.random.key, range(2))
    return [step.forward(program, program.config, variables, images, key) for key in keys]


@pytest.mark.parametrize(('make', 'call'), CASES.values(), ids=CASES)
def test_frozen_layers_of_flax_are_held_in_inference(make, call):
    program, state, _ = begin_foreign(make, call, train__frozen=('backbone/*',))
    one, other = passes(program, state)
    assert equal(one, other)
    before = params.flatten(state.batch_stats)
    for path, leaf in params.flatten(one[1]).items():
        assert np.array_equal(leaf, before[path]) == path.startswith('backbone/'), path
    program, state, _ = begin_foreign(make, call)
    assert not equal(*passes(program, state))


@pytest.mark.parametrize(
    ('kind', 'sentence'),
    [(Stubborn, 'backbone.* is frozen but draws'), (Drifting, 'backbone is frozen, but its mean')],
)
def test_a_frozen_module_that_cannot_be_held_is_refused_by_its_name(kind, sentence):
    def call(block, x, train):
        return block(x, train)

    with pytest.raises(UserError, match='in inference'):
        begin_foreign(kind, call)
    with pytest.raises(UserError, match=sentence):
        begin_foreign(kind, call, train__frozen=('backbone/*',))


@pytest.mark.parametrize('name', MODES)
def test_a_whole_net_is_told_the_mode_by_any_of_its_names(name):
    program, state, values = begin(
        make_config(), shape=(2, 2, 1), model=lambda config, classes: NAMED[name](classes)
    )
    assert not equal(*passes(program, state))
    images = make_batch(shape=(2, 2, 1))['image']
    one, other = (step.predict_step(program, state, part, values) for part in (images, images[:1]))
    np.testing.assert_allclose(one[:1], other, rtol=1e-5)


def test_a_statistic_is_known_by_its_path_whatever_characters_it_has():
    """Nested, `a` comes before `a-b`; as joined paths it is the other way round."""
    before = {'a': {'mean': jnp.zeros(2)}, 'a-b': {'mean': jnp.zeros(2)}}
    moved = jax.make_jaxpr(lambda s: s | {'a': {'mean': s['a']['mean'] + 1}})(before)
    check_statistics(moved, before, lambda module: module == 'a-b')
    with pytest.raises(UserError, match='a is frozen'):
        check_statistics(moved, before, lambda module: module == 'a')
