"""A training step: what it computes, what is on and off in it, and what one compilation serves."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import config as cfg
from cnn_jax import optim, params, rng
from cnn_jax.data.augment import mix
from cnn_jax.errors import UserError
from cnn_jax.models import build
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.regularizers import example_losses, log_probabilities
from cnn_jax.train import step
from cnn_jax.train.program import begin_phase
from tests.train.conftest import (
    begin,
    compiled,
    equal,
    gradient_step,
    make_batch,
    make_config,
    scale,
)

TINY = {'model__widths': (4,), 'model__hidden': ()}
QUIET = {'model__dropout': 0.0, 'model__head_dropout': 0.0}
PLAIN = TINY | QUIET | {'model__norm': 'none', 'model__head_norm': 'none'}
SGD = {'optimizer__name': 'sgd', 'optimizer__momentum': 0.0, 'optimizer__learning_rate': 0.5}
SWITCHES = {
    'loss.l1': 0.01,
    'loss.orthogonality': 0.01,
    'loss.l2_sp': 0.01,
    'loss.activity_l1': 0.01,
    'loss.input_gradient': 0.01,
    'loss.r_drop': 1.0,
    'loss.confidence_penalty': 0.1,
    'loss.focal': 0.5,
    'optimizer.gradient_noise': 0.1,
    'optimizer.max_norm': 0.3,
    'train.swa_from': 0.2,
    'model.drop_ramp': 0.5,
    'augment.mixup': 0.4,
    'augment.cutmix': 1.0,
    'augment.brightness': 0.5,
}


def gradients(config, state=None, batch=None, **options):
    """Gradients, batch statistics and sums of one step; from the first state by default."""
    program, first, values = begin(config, **options)
    return compiled(program, gradient_step)(state or first, batch or make_batch(), values)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope='module')
def everything():
    """All that is optional but SAM, in one compiled step; part of the net is frozen."""
    patterns = {f'loss.{name}_on': ('*',) for name in ('l1', 'l2_sp')}
    patterns['optimizer.max_norm_on'] = ('*conv*/kernel',)
    more = {'train.frozen': ('block1_*',), 'loss.l2': 0.01, 'loss.label_smoothing': 0.1}
    config = cfg.replace(make_config(train__precise_norm=1), SWITCHES | patterns | more)
    program, state, values = begin(config)
    train = compiled(program)
    for number in range(3):
        before, (state, sums) = state, train(state, make_batch(number), values)
    return program, train, before, state, sums, values


def unused_values(program, state, values):
    """The numbers of the config that are not in the compiled program."""
    jaxpr = jax.make_jaxpr(functools.partial(step.train_step, program))(state, make_batch(), values)
    given = dict(zip(sorted(values), jaxpr.jaxpr.invars[-len(values) :]))
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    return {name for name, variable in given.items() if id(variable) not in used}


@pytest.mark.parametrize('change', [{}, {'augment__mixup': 0.4}, {'optimizer__accumulate': 2}])
def test_gradients_are_linear_in_the_class_weights(change):
    config = make_config(**PLAIN | {'loss__label_smoothing': 0.1, 'loss__focal': 1.5} | change)

    def weighted(*weights):
        return gradients(config, class_weights=weights)[0]

    weights = 0.5, 2.0, 0.0
    of_classes = [weighted(*row) for row in np.eye(3)]
    expected = jax.tree.map(lambda *g: np.tensordot(weights, np.stack(g), 1), *of_classes)
    close(weighted(*weights), expected, rtol=1e-4, atol=1e-6)
    close(weighted(1.0, 1.0, 1.0), gradients(config)[0], rtol=1e-6, atol=1e-7)


def test_what_is_off_is_not_in_the_program(everything):
    assert {*SWITCHES, 'optimizer.sam'} <= unused_values(*begin(make_config()))
    program, _, _, state, _, values = everything
    assert not unused_values(program, state, values) & {*SWITCHES, 'loss.l2', 'seed'}


@pytest.mark.parametrize(
    'name',
    [*SWITCHES, 'loss.l2', 'loss.label_smoothing', 'model.dropout', 'model.norm_momentum', 'seed'],
)
def test_one_compilation_serves_every_value(everything, name):
    _, train, _, state, _, values = everything
    one, _ = train(state, make_batch(), values)
    change = np.uint32(2**32 - 1) if name == 'seed' else 0.5 * values[name]
    other, _ = train(state, make_batch(), values | {name: change})
    assert train._cache_size() == 1
    assert not equal(one, other)


def test_a_value_as_argument_is_the_value_in_the_config():
    """The program is the same text, whatever the numbers of its config."""
    texts = []
    for change in (1.0, 0.5):
        cheap = SWITCHES.keys() - {'loss.input_gradient', 'loss.r_drop'}
        strengths = {name: change * SWITCHES[name] for name in cheap}
        strengths |= {'model.dropout': change, 'loss.l2': 0.01 * change}
        strengths['optimizer.learning_rate'] = 0.01 * change
        program, state, values = begin(cfg.replace(make_config(), strengths))
        train = jax.jit(functools.partial(step.train_step, program))
        texts.append(train.lower(state, make_batch(), values).as_text())
    assert texts[0] == texts[1]


def test_a_step_hands_out_no_matrix_of_classes(everything):
    *_, sums, _ = everything
    assert all(np.ndim(leaf) <= 1 for leaf in jax.tree.leaves(sums))


def test_max_norm_holds_after_a_step_where_it_applies(everything):
    for path, leaf in params.flatten(everything[3].params).items():
        if path.endswith('kernel') and not path.startswith('block1_'):
            norms = np.sqrt((np.square(leaf)).sum(axis=tuple(range(leaf.ndim - 1))))
            assert (norms.max() <= 0.3 * (1 + 1e-6)) == ('conv' in path), path


def test_training_never_sees_the_statistics_of_the_evaluated_weights(everything):
    _, train, _, state, _, values = everything
    others = jax.tree.map(lambda leaf: leaf + 1, state.eval_batch_stats)
    a, _ = train(state, make_batch(), values)
    b, _ = train(dataclasses.replace(state, eval_batch_stats=others), make_batch(), values)
    assert equal(dataclasses.replace(a, eval_batch_stats=others), b)


def test_the_average_moves_by_its_weight(everything):
    """Ten steps an epoch, averaged after 0.2 epochs: the third step is the first of the mean."""
    program, train, _, state, _, values = everything
    assert equal(state.averaged, params.partition(state.params, program.trainable)[0])
    new, _ = train(state, make_batch(), values)
    after = params.flatten(new.params)
    expected = {path: (old + after[path]) / 2 for path, old in state.averaged.items()}
    close(new.averaged, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('first', [0.1, 0.3, 2.0])
def test_averages_of_the_weights_have_their_closed_forms(first):
    count, weights = 6, np.random.default_rng(0).normal(size=7)
    averages = {}
    for name, value in (('ema', 0.8), ('swa_from', first)):
        config, averages[name] = cfg.Train(**{name: value}), weights[0]
        for number in range(count):
            share = step.averaging_weight(config, jnp.int32(number), steps_per_epoch=10.0)
            averages[name] = optax.incremental_update(weights[number + 1], averages[name], share)
    news = sum(0.8 ** (count - i) * weights[i] for i in range(1, count + 1))
    assert averages['ema'] == pytest.approx(0.8**count * weights[0] + 0.2 * news, rel=1e-5)
    mean = weights[min(round(10 * first), count - 1) + 1 :].mean()
    assert averages['swa_from'] == pytest.approx(mean, rel=1e-5)


@pytest.fixture(scope='module')
def plain():
    """The gradients of a step without dropout, normalization and regularizers."""
    return gradients(make_config(**PLAIN))


def test_penalties_add_to_the_objective_and_to_the_gradients(plain):
    """The weights are those of the start, the pull of L2-SP is to others."""
    strengths = {'loss__l1': 0.1, 'loss__l2': 0.2, 'loss__l2_sp': 0.3}
    config = make_config(**PLAIN, **strengths, loss__l2_sp_on=('*conv*/kernel',))
    state = begin(config)[1]
    state = dataclasses.replace(state, init_params={k: v - 1 for k, v in state.init_params.items()})
    found, _, sums = gradients(config, state)
    expected, cost = dict(plain[0]), float(sums['loss']) / 8
    for path, w in params.flatten(state.params).items():
        if 'conv' in path and path.endswith('kernel'):
            expected[path] += 0.1 * np.sign(w) + 2 * 0.2 * w + 2 * 0.3
            cost += float(0.1 * abs(w).sum() + 0.2 * (w**2).sum() + 0.3 * w.size)
    close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(sums['objective']) == pytest.approx(cost, rel=1e-5)
    assert float(sums['loss']) == pytest.approx(float(plain[2]['loss']), rel=1e-6)


def test_padding_has_no_part_in_the_loss(plain):
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:4]]), make_batch())
    padded['mask'] = jnp.arange(12) < 8
    found, _, sums = gradients(make_config(**PLAIN), batch=padded)
    close(found, plain[0], rtol=1e-5, atol=1e-6)
    assert sums['count'] == 8


def test_accumulation_gives_the_gradient_of_the_whole_batch(plain):
    found, _, sums = gradients(make_config(**PLAIN, optimizer__accumulate=4))
    close(found, plain[0], rtol=1e-4, atol=1e-6)
    close(sums, plain[2], rtol=1e-5)


def test_bfloat16_computes_near_float32_with_float32_gradients(plain):
    found, _, sums = gradients(make_config(**PLAIN, model__dtype='bfloat16'))
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype('float32')}
    assert float(sums['loss']) == pytest.approx(float(plain[2]['loss']), rel=0.05)
    assert sums['loss'] != plain[2]['loss']


def test_a_step_in_the_form_for_a_gpu_is_the_step():
    """Traced for one, computed here; with all that is summed over the parameters, and SAM."""
    more = {'loss__l2': 0.1, 'loss__l2_sp': 0.1, 'model__input_noise': 0.1}
    config = make_config(**TINY, **SGD, **more, optimizer__sam=0.05, optimizer__clip_norm=1.0)
    found = []
    for platform in ('cpu', 'gpu'):
        program, state, values = begin(config)
        with compiling_for(platform):
            found.append(compiled(program)(state, make_batch(), values))
    close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_sam_takes_the_gradient_uphill_and_nothing_else():
    """By hand: the gradient at the worse point; dropout and batch statistics included."""
    noisy = TINY | {'optimizer__accumulate': 2}
    program, state, values = begin(make_config(**noisy, optimizer__sam=0.1))
    take = compiled(program, gradient_step)
    found = take(state, make_batch(), values)
    assert not equal(found[0], take(state, make_batch(), values | {'optimizer.sam': 0.2})[0])
    program, state, values = begin(make_config(**noisy))
    take = compiled(program, gradient_step)
    first, batch_stats, sums = take(state, make_batch(), values)
    worse = optim.sam_perturb(params.flatten(state.params), first, 0.1)
    there = dataclasses.replace(state, params=params.unflatten(worse))
    close(found[0], take(there, make_batch(), values)[0], rtol=1e-3, atol=1e-5)
    close(found[1], batch_stats, rtol=1e-6)
    close(found[2]['loss'], sums['loss'], rtol=1e-6)


def test_images_are_mixed_as_their_labels_are():
    config = make_config(**PLAIN, augment__mixup=1.0, augment__cutmix=1.0)
    _, _, sums = gradients(config)
    state = begin(config)[1]

    @jax.jit
    def by_hand(one):
        key = rng.key(jnp.uint32(config.seed), 'augment', state.step)
        pixels = scale(one['image'])
        images, other, share = mix(config.augment, key, pixels, one['label'], one['index'])
        logits = build(config.model, 3).apply({'params': state.params}, images, train=False)
        mixed = one | {'other_label': other, 'share': share}
        return example_losses(config, log_probabilities(logits), mixed).sum(), share.min()

    expected, share = by_hand(make_batch())
    np.testing.assert_allclose(sums['loss'], expected, rtol=1e-5)
    assert share < 1


def test_clipping_comes_before_noise_which_is_another_at_each_step():
    clipped = {'optimizer__clip_norm': 1e-3, 'optimizer__gradient_noise': 1.0}
    program, state, values = begin(make_config(**PLAIN, **SGD, **clipped))
    train, quiet = compiled(program), values | {'optimizer.gradient_noise': 0.0}

    def moved(state, values):
        after = train(state, make_batch(), values)[0].params
        old, new = map(params.flatten, (state.params, after))
        return np.concatenate([np.ravel(old[path] - new[path]) / 0.5 for path in old])

    later = dataclasses.replace(state, step=jnp.int32(1))
    assert np.linalg.norm(moved(state, quiet)) == pytest.approx(1e-3, rel=1e-2)
    assert moved(state, values).std() == pytest.approx(1, rel=0.1)
    assert np.array_equal(moved(state, values), moved(state, values))
    assert (moved(state, values) != moved(later, values)).all()


@pytest.mark.parametrize(('done', 'rate'), [(0, 0.0), (10, 0.16), (25, 0.4), (45, 0.4)])
def test_dropout_grows_over_its_share_of_training(done, rate):
    """Of 50 steps, the first 25 lead up to the rate."""
    program, state, values = begin(make_config(model__dropout=0.4, model__drop_ramp=0.5))
    state = dataclasses.replace(state, step=jnp.int32(done))
    assert float(step.bound_config(program, state, values).model.dropout) == pytest.approx(rate)


def test_evaluation_is_of_the_averaged_weights_and_their_statistics_and_draws_nothing():
    program, state, values = begin(make_config(**TINY, train__ema=0.5, train__precise_norm=1))
    evaluate = compiled(program, step.eval_step)
    expected = evaluate(state, make_batch(), values)
    assert equal(expected, evaluate(state, make_batch(), values | {'seed': np.uint32(9)}))
    raw = {name: jax.tree.map(jnp.zeros_like, getattr(state, name)) for name in ('params',)}
    raw['batch_stats'] = jax.tree.map(jnp.ones_like, state.batch_stats)
    assert equal(expected, evaluate(dataclasses.replace(state, **raw), make_batch(), values))
    for name in ('averaged', 'eval_batch_stats'):
        others = jax.tree.map(lambda leaf: leaf * 2 + 1, getattr(state, name))
        changed = dataclasses.replace(state, **{name: others})
        assert evaluate(changed, make_batch(), values)['loss'] != expected['loss']


def test_pooled_statistics_are_those_of_all_values():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(5, 40, 3)) * [1, 5, 0.1] + draw.normal(size=(5, 1, 3))
    pooled = {'norm': {'mean': np.full(3, 7.0), 'var': np.full(3, 9.0)}}  # of no batch yet
    for number, batch in enumerate(values, start=1):
        own = {'norm': {'mean': batch.mean(axis=0), 'var': batch.var(axis=0)}}
        pooled = step.pool_statistics(pooled, jax.tree.map(np.float32, own), jnp.int32(number))
    whole = values.reshape(-1, 3)
    np.testing.assert_allclose(pooled['norm']['mean'], whole.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(pooled['norm']['var'], whole.var(axis=0), rtol=1e-5)


def estimated(config, batches=5):
    """A state whose weights, averages and statistics differ, and its new statistics."""
    program, state, values = begin(config)
    averaged = {path: leaf * 1.5 + 0.1 for path, leaf in state.averaged.items()}
    moved = jax.tree.map(lambda leaf: leaf + 0.5, state.batch_stats)
    state = dataclasses.replace(state, averaged=averaged, batch_stats=moved)
    estimate = compiled(program, step.estimate_step)
    for count in range(1, batches + 1):
        new = estimate(state, make_batch(count - 1), np.int32(count), values)
        state = dataclasses.replace(state, eval_batch_stats=new)
    return program, state, values


def first_layer(weights, images):
    """What the first normalization sees: convolution 3×3 SAME, bias, ReLU, in NumPy."""
    x = np.pad(np.float64(images) / 127.5 - 1, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    kernel = np.float64(weights['block1_conv1/kernel'])
    out = np.einsum('bhwcij,ijco->bhwo', windows, kernel)
    return np.maximum(out + np.float64(weights['block1_conv1/bias']), 0)


def test_estimated_statistics_are_those_of_the_evaluated_weights_over_all_batches():
    _, state, _ = estimated(make_config(train__precise_norm=5, train__ema=0.5))
    seen = np.concatenate([np.asarray(make_batch(number)['image']) for number in range(5)])
    out = first_layer(params.flatten(state.eval_variables['params']), seen)
    found = params.flatten(state.eval_batch_stats)
    for name, expected in (('mean', out.mean((0, 1, 2))), ('var', out.var((0, 1, 2)))):
        got = found[f'block1_norm1/{name}']
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_frozen_statistics_keep_their_bits_and_there_may_be_none():
    _, state, _ = estimated(make_config(train__precise_norm=2, train__frozen=('block1_*',)), 2)
    old, new = params.flatten(state.batch_stats), params.flatten(state.eval_batch_stats)
    for path in old:
        assert np.array_equal(old[path], new[path]) == path.startswith('block1_'), path
    assert estimated(make_config(**PLAIN, train__precise_norm=2), 2)[1].eval_batch_stats == {}


@pytest.mark.parametrize('norm', ['batch', 'ghost', 'renorm'])
def test_estimated_statistics_are_those_that_each_layer_sees_in_inference(norm):
    """Of one batch, so that every layer above was normalized by the same numbers."""
    kinds = {'model__norm': norm, 'model__head_norm': norm, 'model__ghost_batch': 2}
    config = make_config(train__precise_norm=1, model__widths=(4,), **kinds)
    program, state, values = estimated(config, batches=1)
    found, seen = params.flatten(state.eval_batch_stats), {}

    def look(call, args, kwargs, context):
        path = '/'.join(context.module.path)
        if f'{path}/mean' in found:
            seen[path] = np.float64(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        step.eval_step(program, state, make_batch(0), values)
    assert len(seen) == 3
    for path, x in seen.items():
        axes = tuple(range(x.ndim - 1))
        for name, expected in (('mean', x.mean(axes)), ('var', x.var(axes))):
            np.testing.assert_allclose(found[f'{path}/{name}'], expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope='module')
def phases():
    """Two phases: the head first, then blocks 2 and 3 at rates that fall with depth."""
    config = make_config(
        model__widths=(4, 4, 4),
        train__frozen=('block*',),
        train__ema=0.9,
        unfreeze__epochs=1.0,
        unfreeze__frozen=('block1_*',),
        unfreeze__learning_rate=0.001,
        unfreeze__depth_decay=0.1,
    )
    (first, state, values), (second, *_) = (
        begin(config, phase=phase, phase_ends=(3, 6)) for phase in (0, 1)
    )
    between, _ = compiled(first)(state, make_batch(), values)
    return first, second, between, begin_phase(second, between), compiled(second), values


def test_a_second_phase_keeps_what_the_first_has_and_starts_the_rest_anew(phases):
    first, second, between, begun, *_ = phases
    assert {name.split('/')[0] for name in first.trainable} == {'head'}
    new = set(second.trainable) - set(first.trainable)
    assert {name.split('_')[0] for name in new} == {'block2', 'block3'}
    assert equal(between.params, begun.params)
    old, now = between.opt_state.inner_states, begun.opt_state.inner_states
    assert all(equal(old[label], now[label]) for label in old)
    [fresh] = set(now) - set(old)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(now[fresh]))
    weights = params.flatten(between.params)
    assert set(begun.averaged) == set(second.trainable)
    assert all(np.array_equal(begun.averaged[path], weights[path]) for path in new)


def test_rates_that_could_not_fall_are_refused():
    config = make_config(
        model__widths=(4, 4, 4),
        train__frozen=('block*',),
        unfreeze__epochs=1.0,
        unfreeze__frozen=('block1_*', 'block2_*'),
        unfreeze__depth_decay=0.1,
    )
    with pytest.raises(UserError, match='nothing more than one block'):
        begin(config, phase_ends=(3, 6))


def test_rates_fall_with_the_distance_from_the_head_and_are_values(phases):
    """The first step of Adam moves every element by its rate, whatever the gradient."""
    *_, begun, train, values = phases

    def moved(**changes):
        changes = {f'unfreeze.{name}': value for name, value in changes.items()}
        after, before = (
            params.flatten(state.params)
            for state in (train(begun, make_batch(1), values | changes)[0], begun)
        )
        return {path: float(abs(after[path] - before[path]).max()) for path in after}

    far = moved()
    for path, distance in far.items():
        assert (distance > 0) == (not path.startswith('block1_')), path
    assert far['block3_conv2/kernel'] == pytest.approx(1e-3, rel=0.01)
    assert far['block2_conv2/kernel'] == pytest.approx(1e-4, rel=0.01)
    assert far['head/logits/kernel'] > 1e-3
    assert moved(depth_decay=0.5)['block2_conv2/kernel'] == pytest.approx(5e-4, rel=0.01)
    assert moved(learning_rate=0.0)['block3_conv2/kernel'] == 0
    assert train._cache_size() == 1


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'model.outputs': 1}, 'a sigmoid for two classes, but the data have 3'),
        ({'model.padding': 'VALID', 'model.widths': (4, 4, 4)}, 'block2_conv1'),
        ({'train.frozen': ('*',)}, 'nothing is left to train'),
        ({'train.frozen': ('blcok1*',)}, 'matches no parameter'),
        (
            {'unfreeze.epochs': 1.0, 'unfreeze.frozen': ('head/*',)},
            'head/dense1/bias, which the first phase trains',
        ),
        ({'loss.activity_l1': 1.0, 'loss.activity_l1_on': ('conv',)}, 'matches no layer'),
        (
            {
                'loss.activity_l1': 1.0,
                'loss.activity_l1_on': ('block1*',),
                'train.frozen': ('block*',),
            },
            'layers that training does not reach',
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        begin(cfg.replace(make_config(), changes))


@pytest.mark.parametrize(
    'penalty', ['loss.l2', 'loss.l1', 'loss.orthogonality', 'loss.l2_sp', 'optimizer.max_norm']
)
def test_what_would_act_on_nothing_or_on_frozen_parameters_alone_is_refused(penalty):
    frozen = ('block1_*',)
    config = cfg.replace(make_config(train__frozen=frozen), {penalty: 0.1, f'{penalty}_on': frozen})
    with pytest.raises(UserError, match=f'{penalty}_on .* matches frozen parameters alone'):
        begin(config)
    begin(cfg.replace(config, {'unfreeze.epochs': 1.0}))  # a second phase trains them
    with pytest.raises(UserError, match=f'config.{penalty}_on has the pattern'):
        begin(cfg.replace(config, {f'{penalty}_on': ('nothing/*',)}))
