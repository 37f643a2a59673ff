"""Losses and regularizers against Keras, NumPy in float64, and hand computation."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax import regularizers
from cnn_jax.config import Config, replace
from cnn_jax.errors import UserError
from cnn_jax.regularizers import Context, Regularizer, cross_entropy, log_probabilities

STRENGTHS, SEEDS = st.floats(1e-6, 1), st.integers(0, 2**31)


def context(params=None, initial=None, activations=None, logits=((0.0, 0.0),), **others):
    """What a regularizer is shown, with nothing in what it does not need."""
    log_probs = log_probabilities(jnp.float32(logits))
    options = {'config': Config(), 'batch': {}, 'forward': lambda *_, **__: log_probs} | others
    return Context(
        params=params or {}, initial=initial or {}, activations=activations or {},
        log_probs=log_probs, **options,
    )  # fmt: skip


def drawn(seed, shape=(3, 4)):
    draw = np.random.default_rng(seed)
    return {name: jnp.float32(draw.normal(size=shape)) for name in 'ab'}


def of_weights(term, strength=1.0):
    """A regularizer of weights as a function of them; l2_sp pulls to a quarter."""

    def cost(weights):
        initial = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.25), weights)
        return term(strength, context(weights, initial))

    return cost


def test_one_output_gives_both_sides_of_a_sigmoid():
    z = np.array([[-200.0], [0.0], [3.0], [200.0]], np.float32)
    log_probs = log_probabilities(jnp.asarray(z))
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    np.testing.assert_allclose(np.exp(log_probs), np.hstack([1 - p, p]), rtol=1e-6, atol=1e-30)
    assert np.isfinite(log_probs).all()


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('classes', [1, 2, 7])
def test_the_loss_equals_keras(smoothing, classes):
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(9, classes), scale=4).astype(np.float32)
    labels = draw.integers(max(classes, 2), size=9)
    ours = cross_entropy(log_probabilities(jnp.asarray(logits)), labels, smoothing)
    options = {'from_logits': True, 'label_smoothing': smoothing}
    if classes == 1:
        targets = labels[:, None].astype(np.float32)
        theirs = keras.losses.binary_crossentropy(targets, logits, **options)
    else:
        theirs = keras.losses.categorical_crossentropy(np.eye(classes)[labels], logits, **options)
    np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize('classes', [1, 2, 7])
@pytest.mark.parametrize(('gamma', 'smoothing'), [(0.5, 0.0), (2.0, 0.0), (2.0, 0.1)])
def test_the_focal_loss_equals_keras(classes, gamma, smoothing):
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(9, classes), scale=3).astype(np.float32)
    labels = draw.integers(max(classes, 2), size=9)
    ours = cross_entropy(log_probabilities(jnp.asarray(logits)), labels, smoothing, gamma)
    options = {'gamma': gamma, 'from_logits': True}
    if classes == 1:  # smoothed, Keras's takes one power for both sides
        ours = cross_entropy(log_probabilities(jnp.asarray(logits)), labels, focal=gamma)
        theirs = keras.losses.binary_focal_crossentropy(labels[:, None], logits, **options)
    else:
        theirs = keras.losses.categorical_focal_crossentropy(
            np.eye(classes)[labels], logits, alpha=1.0, label_smoothing=smoothing, **options
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('gamma', [0.1, 1.0, 5.0])
def test_the_focal_loss_is_finite_and_flat_where_certain(gamma):
    logits = jnp.float32([[0.0, 500.0], [500.0, 0.0], [0.0, 17.0], [0.0, 0.0]])
    labels = jnp.array([1, 1, 1, 0])

    def loss(gamma, logits):
        return cross_entropy(log_probabilities(logits), labels, 0.1, gamma).sum()

    gradient = jax.jit(jax.grad(loss, argnums=1))(gamma, logits)  # of a traced γ
    assert np.isfinite(gradient).all()
    assert np.isfinite(jax.jvp(jax.grad(loss, 1), (gamma, logits), (0.0, logits + 1))[1]).all()
    step = jnp.float32([[0, 0], [0, 0], [0, 0], [0.01, 0]])
    slope = (loss(gamma, logits + step) - loss(gamma, logits - step)) / 0.02
    np.testing.assert_allclose(gradient[3, 0], slope, rtol=1e-2)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=9).filter(any))
def test_balanced_weights_give_every_class_the_same_sum(counts):
    weights = regularizers.class_weights(
        'balanced', np.array(counts), [*'abcdefghi'][: len(counts)]
    )
    there = [n for n in counts if n]
    sums = [n * w for n, w in zip(counts, weights or [1.0] * len(counts)) if n]
    np.testing.assert_allclose(sums, sum(there) / len(there))
    assert (weights == []) == (len({*there}) == 1)


@pytest.mark.parametrize(
    ('asked', 'weights'),
    [('', []), ('1,1,1', []), ('1, 2.5,0', [1.0, 2.5, 0.0]), ('(3,1,1)', [3.0, 1.0, 1.0])],
)
def test_class_weights_by_number(asked, weights):
    assert regularizers.class_weights(asked, np.ones(3, int), [*'abc']) == weights


@pytest.mark.parametrize('asked', ['1,2', 'Balanced', '1,-1,1', '1,nan,1', '1,inf,1', ',', '1;2;3'])
def test_class_weights_that_are_none(asked):
    with pytest.raises(UserError, match=r'3 numbers of at least 0 .*\(a, b, c\)'):
        regularizers.class_weights(asked, np.ones(3, int), [*'abc'])


def test_the_loss_of_mixed_images_is_shared_as_the_pixels_are():
    log_probs, labels = log_probabilities(jnp.float32([[1.0, -2.0]] * 3)), jnp.array([0, 0, 1])
    mixed = {'label': labels, 'other_label': 1 - labels, 'share': jnp.float32([1.0, 0.25, 0.0])}
    config = replace(Config(), {'loss.label_smoothing': 0.1})
    a, b = (cross_entropy(log_probs, each, 0.1) for each in (labels, 1 - labels))
    got = regularizers.example_losses(config, log_probs, mixed)
    np.testing.assert_allclose(got, [a[0], 0.25 * a[1] + 0.75 * b[1], b[2]], rtol=1e-6)


def entropy(logits):
    p = np.exp(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return -(p * np.log(p)).sum(axis=-1)


@settings(max_examples=20)
@given(st.floats(0, 2), st.integers(2, 9), SEEDS)
def test_confidence_costs_minus_the_entropy(strength, classes, seed):
    logits = np.random.default_rng(seed).normal(size=(5, classes), scale=3)
    got = regularizers.confidence_penalty(strength, context(logits=logits))
    np.testing.assert_allclose(got, -strength * entropy(logits), rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(STRENGTHS, SEEDS)
def test_values_of_the_penalties_of_weights(strength, seed):
    weights = drawn(seed)
    exact = np.concatenate([np.float64(leaf).ravel() for leaf in weights.values()])
    sums = {'l2': (exact**2).sum(), 'l1': abs(exact).sum(), 'l2_sp': ((exact - 0.25) ** 2).sum()}
    for name, expected in sums.items():
        got = of_weights(getattr(regularizers, name), strength)(weights)
        np.testing.assert_allclose(got, strength * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('l2', [0.5, 0.0, -1.0]),
        ('l1', [0.25, 0.0, -0.25]),
        ('l2_sp', [0.375, -0.125, -1.125]),
    ],
)
def test_gradients_of_the_penalties_of_weights(name, expected):
    cost = of_weights(getattr(regularizers, name), 0.25)
    got = jax.grad(cost)({'k': jnp.array([1.0, 0.0, -2.0])})['k']
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('shape', [(3, 3, 2, 5), (1, 1, 2, 6), (4, 4)])
def test_gradient_of_orthogonality_is_the_papers(shape):
    weights = drawn(0, shape)
    gradient = jax.grad(of_weights(regularizers.orthogonality, 0.5))(weights)['a']
    matrix = np.float64(weights['a']).reshape(-1, shape[-1])
    expected = 4 * 0.5 * matrix @ (matrix.T @ matrix - np.eye(shape[-1]))
    np.testing.assert_allclose(gradient.reshape(matrix.shape), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [(3, 3, 2, 5), (1, 1, 2, 6)])
def test_orthogonal_filters_and_biases_cost_nothing(shape):
    flat = (int(np.prod(shape[:-1])), shape[-1])
    matrix, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(max(flat), min(flat))))
    kernel = (matrix if flat[0] > flat[1] else matrix.T).reshape(shape)
    cost = of_weights(regularizers.orthogonality)({'k': jnp.float32(kernel), 'b': jnp.ones(3)})
    assert float(cost) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize('name', ['l2', 'l1', 'orthogonality', 'l2_sp'])
@settings(max_examples=20)
@given(seed=SEEDS)
def test_gradients_are_those_of_finite_differences(name, seed):
    draw = np.random.default_rng(seed)
    at, along, small = *draw.normal(size=(2, 2, 3)), 1e-2
    at += 0.1 * np.sign(at)  # away from the corner of L1
    of = of_weights(getattr(regularizers, name))

    def cost(steps):
        return float(of({'k': jnp.float32(at + steps * small * along)}))

    gradient = jax.grad(of)({'k': jnp.float32(at)})['k']
    # Exact for polynomials up to the fourth degree.
    expected = (8 * (cost(1) - cost(-1)) - (cost(2) - cost(-2))) / (12 * small)
    np.testing.assert_allclose(np.sum(gradient * along), expected, atol=1e-3 * (1 + cost(0)))


def test_activity_is_summed_over_layers_and_averaged_over_examples():
    conv, dense = jnp.float32([[[1.0], [-2.0]], [[0.0], [3.0]]]), -jnp.ones((2, 5))
    called_twice = (dense, (dense, conv))  # which the second time returns two
    seen = context(activations={'conv': (conv,), 'shared': called_twice}, logits=[[0.0, 0.0]] * 2)
    assert float(regularizers.activity_l1(0.5, seen)) == 0.5 * (6 + 10 + 10 + 6) / 2


def test_the_input_gradient_of_a_linear_network_has_a_closed_form():
    """∂ℓ/∂x = W(p − y)."""
    draw = np.random.default_rng(0)
    weights, images, labels = draw.normal(size=(4, 3)), draw.normal(size=(5, 4)), [0, 1, 2, 1, 0]
    batch = {'image': jnp.float32(images), 'label': jnp.array(labels)}

    def forward(images, mask=0):
        return log_probabilities(images @ jnp.float32(weights))

    p = np.exp(images @ weights)
    p /= p.sum(axis=1, keepdims=True)
    gradients = (p - np.eye(3)[labels]) @ weights.T
    got = regularizers.input_gradient(0.3, context(batch=batch, forward=forward))
    np.testing.assert_allclose(got, 0.3 * (gradients**2).sum() / 5, rtol=1e-5)


def test_r_drop_is_half_of_both_losses_and_a_quarter_of_both_divergences():
    first, second = np.random.default_rng(0).normal(size=(2, 4, 3))
    other = log_probabilities(jnp.float32(second))
    batch = {'image': jnp.zeros((4, 1)), 'label': jnp.array([0, 1, 2, 0])}
    seen = context(
        logits=first, batch=batch, forward=lambda images, mask: {1: other}[mask]
    )  # of another mask
    p, q = (np.float64(np.exp(each)) for each in (seen.log_probs, other))
    divergence = (p * np.log(p / q) + q * np.log(q / p)).sum(axis=1)
    one, two = (-np.log(each[np.arange(4), batch['label']]) for each in (p, q))
    got = one + regularizers.r_drop(0.7, seen)
    np.testing.assert_allclose(got, 0.5 * (one + two) + 0.7 / 4 * divergence, rtol=1e-4)


@pytest.mark.parametrize('regularizer', regularizers.REGULARIZERS, ids=lambda each: each.field)
def test_a_strength_may_be_traced_and_scales_the_term(regularizer: Regularizer):
    weights, batch = drawn(1), {'image': jnp.ones((2, 2)), 'label': jnp.array([0, 1])}
    seen = context(
        weights, drawn(2), drawn(3), [[1.0, 2.0]] * 2,
        batch=batch, forward=lambda images, mask=0: log_probabilities(images * 3),
    )  # fmt: skip
    term = jax.jit(lambda strength: regularizer.term(strength, seen))
    rest = regularizer.term(0.0, seen)  # R-Drop has one
    np.testing.assert_allclose(term(0.3) - rest, 0.3 * (term(1.0) - rest), rtol=1e-5)


def test_terms_of_examples_and_of_the_batch_are_added_where_they_belong():
    each = functools.partial(Regularizer, 'loss.own')
    terms = [each(lambda s, c: s * jnp.array([1.0, 2.0])), each(lambda s, c: s * jnp.float32(5.0))]
    config = replace(Config(), {'loss.own': 2.0})
    got = regularizers.add_terms(terms, lambda _: context(config=config), jnp.zeros(2))
    np.testing.assert_array_equal(got[0], [2.0, 4.0])
    assert got[1] == 10.0
