"""What stopped being finite is named: the step, the layer, the examples, the parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import params
from cnn_jax.data.batches import DeviceBatches
from cnn_jax.tools.nonfinite import locate
from cnn_jax.train.loop import before_step, compile_phase, steps
from tests.train.conftest import SHAPE, begin, copied, made_up

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


@pytest.fixture
def located(small, batch):
    """Locates what is not finite in the first step; some parameters are computed from the drawn."""

    def make(config, changes=None, given=None, prepare=scale, **options):
        program, state, _ = begin(small(**config), prepare=prepare, **options)
        flat = params.flatten(state.params)
        flat |= {path: change(flat[path]) for path, change in (changes or {}).items()}
        state = state.replace(params=params.unflatten(flat))
        return locate(program, state, given or batch())

    return make


def open_phases(config, phase_ends):
    """The phases of a run on made-up images, the state before the first step, and the values."""
    phases = []
    for number, end in enumerate(phase_ends):
        program, state, values = begin(config, phase=number, phase_ends=phase_ends, prepare=scale)
        batches = DeviceBatches(made_up(0, 24, SHAPE), batch=8, seed=config.seed)
        phases.append(compile_phase(program, end, state, train=batches))
    return phases, lambda: begin(config, phase_ends=phase_ends)[1], values


def test_a_rate_too_high_is_found_at_its_step_and_layer(small):
    config = small(**PLAIN, optimizer__learning_rate=1e30)
    phases, start, values = open_phases(config, (50,))
    before = copied(start())
    for taken in steps(phases, start(), 0, values):
        if not np.isfinite(taken.sums['objective']):
            break
        before = copied(taken.state)
    found = before_step(phases, start(), 0, taken.number, values)
    jax.tree.map(np.testing.assert_array_equal, found[1:], (before, taken.batch))
    text = locate(phases[0].program, *found[1:])
    assert text == f'block1_conv2 gave inf for all 8 examples{FINITE}'


@pytest.mark.parametrize(
    ('pieces', 'spoilt', 'named'),
    [
        (2, (13, 1), 'examples 61, 73'),
        (1, range(15), 'examples 60, 61, 62, 63, 64, 65, 66, 67 and 7 more'),
    ],
)
def test_images_that_the_preparation_spoils_are_named_by_their_index_in_the_data(
    located, batch, pieces, spoilt, named
):
    given = batch(number=3, size=20)
    images = np.ones_like(given['image'])
    images[list(spoilt), 2, 3, 0] = 0
    text = located(
        TINY | {'data__batch': 20, 'optimizer__accumulate': pieces},
        given=given | {'image': images},
        prepare=lambda images: 1 / images.astype(jnp.float32),
    )
    assert text == f'the preparation of the images gave inf for {named}{FINITE}'


def test_a_layer_that_overflows_for_one_example_is_named_with_it(located, batch):
    given = batch()
    given |= {'image': jnp.zeros_like(given['image']).at[5].set(255)}
    changes = {'block1_conv1/kernel': lambda w: jnp.full_like(w, 1e3)}
    text = located(PLAIN, changes, given, prepare=lambda images: images * jnp.float32(1e35))
    assert text == f'block1_conv1 gave inf for example 5{FINITE}'


NAMED = {  # config, changes of parameters, what is said
    'nan': (
        *(TINY, {'block1_conv2/kernel': lambda w: w.at[0, 1].set(jnp.nan)}),
        'block1_conv2/kernel was nan before the step',
    ),
    'sam': (PLAIN | {'optimizer__sam': 1e30}, {}, 'the loss or its gradient was not finite uphill'),
    'penalty': (
        PLAIN | {'loss__l2': 1.0, 'loss__l2_on': ('head/*/kernel',)},
        {
            'block1_conv1/kernel': lambda w: w * 1e-25,
            'head/logits/kernel': lambda w: jnp.full_like(w, 1e20),
        },
        'the penalty config.loss.l2 was inf (the loss without it was finite)',
    ),
    'bfloat16': (
        *(PLAIN | {'model__dtype': 'bfloat16'}, {'block1_conv2/bias': lambda b: b + 3.4e38}),
        'block1_conv2 gave inf for all 8 examples',
    ),
}


@pytest.mark.parametrize('case', NAMED)
def test_what_is_not_finite_is_named(located, case):
    config, changes, said = NAMED[case]
    assert located(config, changes).startswith(said)


@pytest.mark.parametrize(
    ('optimizer', 'power', 'named'),
    [
        ('adam', 37, 'the gradient of block1_conv1/kernel was inf (the loss was finite)'),
        ('clipped', 37, 'the gradient of block1_conv1/kernel was inf (the loss was finite)'),
        ('sgd', 25, 'the norm of the gradient was inf, of which block1_conv1/kernel has the'),
    ],
)
def test_a_gradient_that_overflows_while_the_loss_does_not_is_named(
    located, optimizer, power, named
):
    """Huge images and tiny weights: the outputs are ordinary, the weights' gradients are not."""
    huge = jnp.float32(10.0**power)
    changes = {
        'block1_conv1/kernel': lambda w: w / huge,
        'head/logits/kernel': lambda w: w * 1e3,
    }
    config = PLAIN | OPTIMIZERS[optimizer]
    assert located(config, changes, prepare=lambda images: scale(images) * huge).startswith(named)


def test_frozen_backbones_are_looked_into(located, batch):
    shape = (32, 32, 3)
    changes = {'backbone/block1_conv2/kernel': lambda w: jnp.full_like(w, 3e38)}
    text = located(VGG, changes, batch(size=2, shape=shape), shape=shape)
    assert text == f'backbone/block1_conv2 gave nan for all 2 examples{FINITE}'


@pytest.mark.parametrize(
    ('value', 'named'),
    [
        (1, 'the step was finite'),
        (3e38, f'head/logits gave inf for example 2{FINITE}'),
        (np.nan, f'the frozen backbone gave nan for example 2{FINITE}'),
    ],
)
def test_cached_features_are_looked_into(located, batch, value, named):
    features = np.ones((4, 16, 16, 64), np.float32)
    features[2, 0, 0, 0] = value
    changes = {'head/logits/kernel': lambda w: abs(w) + 2}
    given = batch(size=4) | {'image': features}
    assert located(VGG, changes, given, shape=(32, 32, 3), cached='block1_pool').startswith(named)
