"""What stopped being finite is named: the step, the layer, the examples, the parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import params
from cnn_jax.data.batches import Arrays, DeviceBatches
from cnn_jax.train.loop import Phase
from cnn_jax.train.nonfinite import locate, replay
from cnn_jax.train.step import make_steps, values_of
from cnn_jax.train.task import Task

SHAPE, CLASSES = (8, 8, 1), 3
FINITE = ' (the parameters were finite)'
TINY = {'model__widths': (4,), 'model__hidden': ()}
PLAIN = TINY | {'model__norm': 'none', 'optimizer__name': 'sgd'}
VGG = {
    'model__name': 'vgg16',
    'model__cut': 'block1_pool',
    'model__hidden': (),
    'train__frozen': ('backbone/*',),
}
OPTIMIZERS = {
    'sgd': {'optimizer__name': 'sgd'},
    'adam': {'optimizer__name': 'adam'},
    'clipped': {'optimizer__name': 'sgd', 'optimizer__clip_norm': 1.0},
}


def scale(images):
    return images.astype(jnp.float32) / 255


def make_task(prepare=scale, shape=SHAPE, ends=(50,)):
    return Task(shape, CLASSES, prepare, steps_per_epoch=10.0, ends=ends)


def make_state(config, task, changes=None, cached=False):
    """The first state, some of its parameters computed from the drawn ones."""
    state = make_steps(config, task, cached=cached).init(config.seed)
    flat = params.flatten(state.params)
    flat |= {path: change(flat[path]) for path, change in (changes or {}).items()}
    return state.replace(params=params.unflatten(flat))


def split(shape=SHAPE, count=24, batch=8):
    draw = np.random.default_rng(0)
    images = draw.integers(1, 256, (count, *shape)).astype(np.uint8)
    labels = draw.integers(0, CLASSES, count).astype(np.int32)
    return DeviceBatches(Arrays(images, labels, tuple('abc'), 'made up'), batch=batch)


def test_a_rate_too_high_is_found_at_its_step_and_layer(small):
    config, task = small(**PLAIN, optimizer__learning_rate=1e30), make_task()
    steps, values = make_steps(config, task), values_of(config)
    train, batches, state = jax.jit(steps.train), split().train(), steps.init(config.seed)
    loss = 0.0
    while np.isfinite(loss):
        before, given = state, next(batches)
        state, sums = train(before, given, values)
        loss = sums['objective']

    start = steps.init(config.seed)
    found = replay([Phase(steps, 50, split(), None)], 0, start, 0, int(state.step), values)
    jax.tree.map(np.testing.assert_array_equal, found, (0, before, given))
    text = locate(config, task, 0, False, *found[1:])
    assert text == f'block1_conv2 gave inf for all 8 examples{FINITE}'


def test_a_replay_enters_the_second_phase(small):
    config = small(train__frozen=('block*',), unfreeze__epochs=1.0, unfreeze__frozen=('block1_*',))
    task, values = make_task(ends=(3, 8)), values_of(config)
    phases = [
        Phase(make_steps(config, task, number), end, split(), None)
        for number, end in enumerate(task.ends)
    ]
    state, batches = phases[0].steps.init(config.seed), split().train()
    for step in range(5):
        if step == 3:
            state = phases[1].steps.enter(state)
        state, _ = jax.jit(phases[step >= 3].steps.train)(state, next(batches), values)
    found = replay(phases, 0, phases[0].steps.init(config.seed), 0, 6, values)
    jax.tree.map(np.testing.assert_array_equal, found, (1, state, next(batches)))
    assert locate(config, task, 1, False, *found[1:]).startswith('repeated, the step was finite')


@pytest.mark.parametrize(
    ('pieces', 'spoilt', 'named'),
    [
        (2, (13, 1), 'examples 61, 73'),
        (1, range(15), 'examples 60, 61, 62, 63, 64, 65, 66, 67 and 7 more'),
    ],
)
def test_images_that_the_preparation_spoils_are_named_by_their_index_in_the_data(
    small, batch, pieces, spoilt, named
):
    config = small(**TINY, data__batch=20, optimizer__accumulate=pieces)
    task = make_task(prepare=lambda images: 1 / images.astype(jnp.float32))
    given = batch(number=3, size=20)
    images = np.ones_like(given['image'])
    images[list(spoilt), 2, 3, 0] = 0
    text = locate(config, task, 0, False, make_state(config, task), given | {'image': images})
    assert text == f'the preparation of the images gave inf for {named}{FINITE}'


def test_a_layer_that_overflows_for_one_example_is_named_with_it(small, batch):
    config, task = small(**PLAIN), make_task(prepare=lambda images: images * jnp.float32(1e35))
    state = make_state(config, task, {'block1_conv1/kernel': lambda w: jnp.full_like(w, 1e3)})
    given = batch()
    given |= {'image': jnp.zeros_like(given['image']).at[5].set(255)}
    text = locate(config, task, 0, False, state, given)
    assert text == f'block1_conv1 gave inf for example 5{FINITE}'


@pytest.mark.parametrize('bad', ['nan', 'inf'])
def test_a_parameter_that_is_not_finite_is_named(small, batch, bad):
    config, task = small(), make_task()
    state = make_state(config, task, {'block2_conv1/kernel': lambda w: w.at[0, 1].set(float(bad))})
    text = locate(config, task, 0, False, state, batch())
    assert text == f'block2_conv1/kernel was {bad} before the step'


@pytest.mark.parametrize(
    ('optimizer', 'power', 'named'),
    [
        ('sgd', 37, 'the gradient of block1_conv1/kernel was inf (the loss was finite)'),
        ('adam', 37, 'the gradient of block1_conv1/kernel was inf (the loss was finite)'),
        ('clipped', 37, 'the gradient of block1_conv1/kernel was inf (the loss was finite)'),
        ('sgd', 25, 'the norm of the gradient was inf, of which block1_conv1/kernel has the'),
    ],
)
def test_a_gradient_that_overflows_while_the_loss_does_not_is_named(
    small, batch, optimizer, power, named
):
    """Huge images and tiny weights: the outputs are ordinary, the weights' gradients are not."""
    huge = jnp.float32(10.0**power)
    config = small(**PLAIN | OPTIMIZERS[optimizer])
    task = make_task(prepare=lambda images: scale(images) * huge)
    changes = {
        'block1_conv1/kernel': lambda w: w / huge,
        'head/logits/kernel': lambda w: w * 1e3,
    }
    state = make_state(config, task, changes)
    assert locate(config, task, 0, False, state, batch()).startswith(named)


def test_a_gradient_that_overflows_uphill_alone_is_said(small, batch):
    config, task = small(**PLAIN, optimizer__sam=1e30), make_task()
    text = locate(config, task, 0, False, make_state(config, task), batch())
    assert text.endswith('uphill, where SAM takes it; lower config.optimizer.sam, which is 1e+30')


def test_a_penalty_that_overflows_is_named(small, batch):
    config, task = small(**PLAIN, loss__l2=1.0, loss__l2_on=('head/*/kernel',)), make_task()
    changes = {
        'block1_conv1/kernel': lambda w: w * 1e-25,
        'head/logits/kernel': lambda w: jnp.full_like(w, 1e20),
    }
    state = make_state(config, task, changes)
    text = locate(config, task, 0, False, state, batch())
    assert text == 'the penalty config.loss.l2 was inf (the loss without it was finite)'


def test_frozen_backbones_are_looked_into(small, batch):
    shape = (32, 32, 3)
    config, task = small(**VGG), make_task(shape=shape)
    path = 'backbone/block1_conv2/kernel'
    state = make_state(config, task, {path: lambda w: jnp.full_like(w, 3e38)})
    text = locate(config, task, 0, False, state, batch(size=2, shape=shape))
    assert text == f'backbone/block1_conv2 gave inf for all 2 examples{FINITE}'


def test_cached_features_are_looked_into(small, batch):
    config, task = small(**VGG), make_task(shape=(32, 32, 3))
    state = make_state(config, task, {'head/logits/kernel': lambda w: abs(w) + 2}, cached=True)
    features = np.ones((4, 16, 16, 64), np.float32)
    given = batch(size=4) | {'image': features}

    def found(value):
        features[2, 0, 0, 0] = value
        return locate(config, task, 0, True, state, given)

    assert found(1).startswith('repeated, the step was finite')
    assert found(3e38) == f'head/logits gave inf for example 2{FINITE}'
    assert found(np.nan) == f'the frozen backbone gave nan for example 2{FINITE}'


def test_bfloat16_is_looked_into(small, batch):
    config, task = small(model__dtype='bfloat16', **PLAIN), make_task()
    state = make_state(config, task, {'block1_conv2/bias': lambda b: b + 3.4e38})
    text = locate(config, task, 0, False, state, batch())
    assert text.startswith('block1_conv2 gave inf for all 8 examples')
