"""Frozen means: not differentiated, no optimizer memory, no decay, no drift, bit for bit equal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import params
from cnn_jax.errors import UserError

OPTIMIZERS = ('sgd', 'adam', 'adamw')
EXTRAS = {
    'plain': {},
    'decay': {'optimizer__weight_decay': 0.1, 'loss__l2': 0.1},
    'clip': {'optimizer__clip_norm': 0.5},
    'ema': {'train__ema': 0.9},
    'accumulate': {'optimizer__accumulate': 2},
}
NORMED = {'train__frozen': ('block1_*',)}
VGG = {
    'model__name': 'vgg16',
    'train__frozen': ('backbone/*',),
    'model__cut': 'block2_pool',
    'model__head_norm': 'none',
}
BACKBONES = {'batch norm and dropout': (NORMED, (8, 8, 1)), 'vgg16': (VGG, (32, 32, 3))}


def after(run, batch, config, shape, count=3):
    """The steps, the first state and the one after some steps."""
    steps, first, values = run(config, shape)
    train, state = jax.jit(steps.train), first
    for number in range(count):
        state, sums = train(state, batch(number, shape=shape), values)
    return steps, first, state, sums


@pytest.mark.parametrize(
    ('backbone', 'optimizer', 'extra'),
    [
        *(('batch norm and dropout', *each) for each in itertools.product(OPTIMIZERS, EXTRAS)),
        *(('vgg16', optimizer, 'plain') for optimizer in OPTIMIZERS),
        *(('vgg16', 'sgd', extra) for extra in EXTRAS if extra != 'plain'),
    ],
)
def test_frozen_leaves_are_bit_equal_and_cost_no_optimizer_memory(
    small, run, batch, backbone, optimizer, extra
):
    changes, shape = BACKBONES[backbone]
    decay_on = {'loss__l2_on': ('*/kernel',)}
    config = small(optimizer__name=optimizer, **changes, **decay_on, **EXTRAS[extra])
    steps, first, last, _ = after(run, batch, config, shape)

    learned, fixed = params.partition(last.params, steps.trainable)
    learned_before, fixed_before = params.partition(first.params, steps.trainable)
    assert fixed
    for path, leaf in fixed.items():
        assert np.asarray(leaf).tobytes() == np.asarray(fixed_before[path]).tobytes(), path
    assert all((learned[path] != learned_before[path]).any() for path in learned)

    stats, stats_before = map(params.flatten, (last.batch_stats, first.batch_stats))
    for path in stats:
        moved = (stats[path] != stats_before[path]).any()
        assert moved != path.startswith('block1_'), path

    # One momentum for SGD, two for Adam, of the trained parameters alone; and counters.
    moments = {'sgd': 1, 'adam': 2, 'adamw': 2}[optimizer]
    counters = sum(x.nbytes for x in jax.tree.leaves(last.opt_state) if x.ndim == 0)
    assert params.nbytes(last.opt_state) == moments * params.nbytes(learned) + counters
    assert counters <= 8
    assert set(last.ema) == (set(learned) if extra == 'ema' else set())


def test_frozen_dropout_and_norm_are_in_inference_mode(small, run, batch):
    """An example gives the same loss whatever is drawn, and whatever else is in its batch."""
    everything = small(
        train__frozen=('block*',),
        model__dropout=0.9,
        model__head_dropout=0.0,
        model__head_norm='none',
    )
    steps, state, values = run(everything)
    train, one, other = jax.jit(steps.train), batch(), batch(1)
    mask = jnp.arange(8) == 0
    losses = []
    for rest, seed in ((one, 0), (one, 77), (other, 0)):
        given = {name: jnp.concatenate([one[name][:1], rest[name][1:]]) for name in one}
        _, sums = train(state, given | {'mask': mask}, values | {'seed': np.uint32(seed)})
        losses.append(float(sums['loss']))
    assert losses[0] == losses[1] == losses[2]


def test_clipping_sees_only_the_trained(small, run, batch):
    *_, frozen = after(run, batch, small(**NORMED), (8, 8, 1), count=1)
    *_, whole = after(run, batch, small(), (8, 8, 1), count=1)
    assert 0 < float(frozen['gradient_norm']) < float(whole['gradient_norm'])


def test_there_is_no_backward_pass_through_a_frozen_backbone(small, run, batch):
    shape = (32, 32, 3)

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']

    steps, state, values = run(small(**VGG), shape)
    forward = flops(steps.evaluate, state, batch(shape=shape), values)
    frozen = flops(steps.train, state, batch(shape=shape), values)
    steps, state, values = run(small(**VGG | {'train__frozen': ()}), shape)
    whole = flops(steps.train, state, batch(shape=shape), values)
    assert frozen < 1.1 * forward
    assert whole > 2.5 * forward


def test_freezing_everything_says_that_nothing_is_left(small, run):
    with pytest.raises(UserError, match='nothing is left to train'):
        run(small(train__frozen=('*',)))


def test_a_pattern_without_a_match_is_refused(small, run):
    with pytest.raises(UserError, match='matches no parameter'):
        run(small(train__frozen=('blcok1*',)))
