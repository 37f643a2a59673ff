"""Regularizers in the compiled step: what they add, what they leave alone, what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax import losses, optim, params, rng
from cnn_jax.data.augment import mix
from cnn_jax.errors import UserError
from cnn_jax.models import build
from cnn_jax.train.step import ramped, values_of

SGD = {'optimizer__name': 'sgd', 'optimizer__momentum': 0.0, 'optimizer__learning_rate': 0.5}
QUIET = {'model__dropout': 0.0, 'model__head_dropout': 0.0}
SWITCHES = {
    'loss.l1': 0.01,
    'loss.orthogonality': 0.01,
    'loss.l2_sp': 0.01,
    'loss.confidence_penalty': 0.1,
    'optimizer.gradient_noise': 0.1,
    'optimizer.max_norm': 1.0,
    'optimizer.sam': 0.05,
    'train.ema': 0.9,
    'train.swa_from': 0.2,
    'model.drop_ramp': 0.5,
    'augment.mixup': 0.4,
    'augment.cutmix': 1.0,
}


def flat(state):
    return params.flatten(state.params)


def gradient(run, batch, config):
    """The gradient of one step, as plain SGD shows it, and the metrics."""
    steps, state, values = run(config)
    new, sums = jax.jit(steps.train)(state, batch(), values)
    before, after = flat(state), flat(new)
    return {path: (before[path] - after[path]) / 0.5 for path in after}, sums, before


def test_off_is_the_step_without_it(small, run, batch):
    steps, state, values = run(small())
    plain = jax.jit(steps.train).lower(state, batch(), values).as_text()
    again = jax.jit(steps.train).lower(state, batch(), values | SWITCHES).as_text()
    assert plain == again


@pytest.mark.parametrize('name', SWITCHES)
def test_one_compilation_serves_every_strength(small, run, batch, name):
    config = cfg.replace(small(), {name: SWITCHES[name]})
    steps, state, values = run(config)
    state = dataclasses.replace(state, step=jnp.int32(3))
    train = jax.jit(steps.train)
    one, _ = train(state, batch(), values)
    other, _ = train(state, batch(), values | {name: 0.5 * SWITCHES[name]})
    assert train._cache_size() == 1
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)))]
    assert any(changed) or name in ('loss.l2_sp', 'train.swa_from')  # at 0; both have begun


def test_penalties_add_their_gradients(small, run, batch):
    plain, _, weights = gradient(run, batch, small(**SGD, **QUIET))
    elastic, sums, _ = gradient(run, batch, small(**SGD, **QUIET, loss__l1=0.1, loss__l2=0.2))
    for path, leaf in weights.items():
        on = path.startswith('block') and path.endswith('conv1/kernel')
        if on:
            expected = plain[path] + 0.1 * np.sign(leaf) + 2 * 0.2 * leaf
            np.testing.assert_allclose(elastic[path], expected, rtol=1e-4, atol=1e-5)
        elif path.startswith('head/'):
            np.testing.assert_allclose(elastic[path], plain[path], rtol=1e-4, atol=1e-6)
    assert float(sums['objective']) > float(sums['loss']) / 8


def test_a_pattern_in_use_must_match_something(small, run):
    for name in ('loss.l1', 'loss.orthogonality', 'loss.l2_sp', 'optimizer.max_norm'):
        config = cfg.replace(small(), {name: 0.1, f'{name}_on': ('nothing/*',)})
        with pytest.raises(UserError, match=f'config.{name}_on has the pattern'):
            run(config)


def test_l2_sp_starts_without_a_pull_and_then_pulls_to_the_start(small, run, batch):
    config = small(**SGD, **QUIET, loss__l2_sp=0.1)
    steps, state, values = run(config)
    assert set(state.start) == set(steps.penalized['l2_sp']) != set()
    plain, first, values_off = run(small(**SGD, **QUIET))
    a, _ = jax.jit(steps.train)(state, batch(), values)
    b, _ = jax.jit(plain.train)(first, batch(), values_off)
    assert all(np.array_equal(flat(a)[path], flat(b)[path]) for path in flat(a))
    c, _ = jax.jit(steps.train)(a, batch(1), values)
    d, _ = jax.jit(plain.train)(b, batch(1), values_off)
    for path in state.start:
        pull = 0.5 * 2 * 0.1 * (flat(a)[path] - state.start[path])
        np.testing.assert_allclose(flat(c)[path], flat(d)[path] - pull, rtol=1e-4, atol=1e-5)


def test_max_norm_holds_after_every_step_where_it_applies(small, run, batch):
    config = small(optimizer__max_norm=0.3, optimizer__max_norm_on=('*conv*/kernel',))
    steps, state, values = run(config)
    for number in range(2):
        state, _ = jax.jit(steps.train)(state, batch(number), values)
        for path, leaf in flat(state).items():
            if path.endswith('kernel'):
                norms = np.sqrt((np.square(leaf)).sum(axis=tuple(range(leaf.ndim - 1))))
                assert (norms.max() <= 0.3 * (1 + 1e-6)) == ('conv' in path), path


@pytest.mark.parametrize('accumulate', [1, 2])
def test_sam_takes_the_gradient_uphill_and_nothing_else(small, run, batch, accumulate):
    """By hand: two plain steps, of which the second starts at the worse point."""
    noisy = SGD | {'optimizer__accumulate': accumulate}  # dropout and batch statistics included
    steps, state, values = run(small(**noisy, optimizer__sam=0.1))
    found, sums = jax.jit(steps.train)(state, batch(), values)

    plain, first, plain_values = run(small(**noisy))
    g, plain_sums, weights = gradient(run, batch, small(**noisy))
    worse = optim.uphill(weights, g, 0.1)
    at_worse = dataclasses.replace(first, params=params.unflatten(worse))
    there, _ = jax.jit(plain.train)(at_worse, batch(), plain_values)
    for path in weights:
        expected = weights[path] - (worse[path] - flat(there)[path])
        np.testing.assert_allclose(flat(found)[path], expected, rtol=1e-3, atol=2e-4)
    again, _ = jax.jit(plain.train)(first, batch(), plain_values)
    for a, b in zip(*map(jax.tree.leaves, (found.batch_stats, again.batch_stats))):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert float(sums['loss']) == pytest.approx(float(plain_sums['loss']), rel=1e-6)


def test_gradient_noise_is_another_at_each_step_and_the_same_again(small, run, batch):
    config = small(**SGD, **QUIET, optimizer__gradient_noise=1.0)
    steps, state, values = run(config)
    train = jax.jit(steps.train)
    later = dataclasses.replace(state, step=jnp.int32(1))
    first, again, other = (train(s, batch(), values)[0] for s in (state, state, later))
    assert all(np.array_equal(flat(first)[path], flat(again)[path]) for path in flat(first))
    assert all((flat(first)[path] != flat(other)[path]).any() for path in flat(first))


def test_clipping_takes_the_gradient_to_its_bound_and_leaves_the_noise(small, run, batch):
    steps = {}
    for noise in (0.0, 1.0):
        changes = {'optimizer__clip_norm': 1e-3, 'optimizer__gradient_noise': noise}
        found, _, weights = gradient(run, batch, small(**SGD, **QUIET, **changes))
        steps[noise] = np.concatenate([np.ravel(found[path]) for path in weights])
    assert np.linalg.norm(steps[0.0]) == pytest.approx(1e-3, rel=1e-2)
    assert steps[1.0].std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    'penalty', ['loss.l2', 'loss.l1', 'loss.orthogonality', 'loss.l2_sp', 'optimizer.max_norm']
)
def test_what_would_act_on_frozen_parameters_alone_is_refused(small, run, penalty):
    config = cfg.replace(small(train__frozen=FROZEN), {penalty: 0.1, f'{penalty}_on': FROZEN})
    with pytest.raises(UserError, match=f'{penalty}_on .* matches frozen parameters alone'):
        run(config)
    run(cfg.replace(config, {'unfreeze.epochs': 1.0}))  # a second phase trains them


@pytest.mark.parametrize(('done', 'rate'), [(0.0, 0.0), (0.2, 0.16), (0.5, 0.4), (0.9, 0.4)])
def test_dropout_grows_over_its_share_of_training(done, rate):
    config = cfg.replace(cfg.Config(), {'model.dropout': 0.4, 'model.drop_ramp': 0.5})
    assert float(ramped(config, jnp.float32(done)).model.dropout) == pytest.approx(rate)


def test_a_ramp_starts_without_dropout_and_ends_with_all_of_it(small, run, batch):
    """50 steps, of which the first 25 lead up to the rate."""
    steps, state, values = run(small(model__dropout=0.9, model__drop_ramp=0.5))
    for step, like in ((0, 0.0), (25, 0.9)):
        at = dataclasses.replace(state, step=jnp.int32(step))
        plain, _, plain_values = run(small(model__dropout=like))
        a, _ = jax.jit(steps.train)(at, batch(), values)
        b, _ = jax.jit(plain.train)(at, batch(), plain_values)
        np.testing.assert_allclose(
            flat(a)['block1_conv1/kernel'], flat(b)['block1_conv1/kernel'], rtol=1e-5, atol=1e-7
        )


FROZEN = ('block1_*',)


def test_frozen_leaves_have_no_part_in_any_of_it(small, run, batch):
    for average in ('train.ema', 'train.swa_from'):
        on = {name: given for name, given in SWITCHES.items() if not name.startswith('train')}
        everything = {
            'loss.l1_on': ('*',),
            'loss.l2_sp_on': ('*',),
            'optimizer.max_norm_on': ('*',),
        }
        config = cfg.replace(
            small(train__frozen=FROZEN),
            on | everything | {average: SWITCHES[average], 'optimizer.max_norm': 0.01},
        )
        steps, first, values = run(config)
        state = first
        for number in range(3):
            state, _ = jax.jit(steps.train)(state, batch(number), values)
        before, after = flat(first), flat(state)
        for path, leaf in after.items():
            same = np.asarray(leaf).tobytes() == np.asarray(before[path]).tobytes()
            assert same == path.startswith('block1_'), path
        assert not [path for path in {**state.ema, **state.start} if path.startswith('block1_')]
        assert values_of(config).keys() == values.keys()


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_the_loss_of_mixed_images_is_shared_as_the_pixels_are(small, run, batch, kind):
    config = small(**SGD, **QUIET, **{f'augment__{kind}': 1.0})
    steps, state, values = run(config)
    _, sums = jax.jit(steps.train)(state, batch(), values)

    key = rng.key(jnp.uint32(config.seed), 'augment', state.step)
    one, index = batch(), batch()['index']
    images, other, share = mix(config.augment, key, one['image'] / 127.5 - 1, one['label'], index)
    net = build(config.model, 3)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    rngs = {'dropout': jax.random.key(0)}
    logits, _ = net.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])
    log_probs = losses.log_probabilities(logits)
    expected = share * losses.cross_entropy(log_probs, one['label'])
    expected += (1 - share) * losses.cross_entropy(log_probs, other)
    np.testing.assert_allclose(sums['loss'], expected.sum(), rtol=1e-5)
    assert float(share.min()) < 1
