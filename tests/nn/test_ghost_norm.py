"""Ghost batch norm is batch norm, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.nn.norm import BatchNorm, GhostBatchNorm


def images(shape, seed=0):
    return (2 * np.random.default_rng(seed).normal(size=shape) + 3).astype(np.float32)


def train(layer, variables, x):
    return layer.apply(variables, x, train=True, mutable='batch_stats')


@pytest.fixture(params=[(12, 5, 4, 3), (12, 3)], ids=str)
def x(request):
    return images(request.param)


@pytest.fixture
def variables(x):
    drawn = BatchNorm().init(jax.random.key(0), x, train=True)
    return {**drawn, 'params': {'scale': jnp.arange(1.0, 4), 'bias': jnp.arange(3.0)}}


def test_one_group_is_batch_norm_with_its_gradient(x, variables):
    def loss(layer):
        return lambda v, x: (train(layer, v, x)[0] ** 3).sum()

    ghost, batch = GhostBatchNorm(group_size=12), BatchNorm()
    for ours, theirs in zip(train(ghost, variables, x), train(batch, variables, x)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    gradients = (jax.grad(loss(layer), argnums=(0, 1))(variables, x) for layer in (ghost, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), *gradients)


def test_each_group_is_normalized_as_a_batch_of_its_own(x, variables):
    y, updated = train(GhostBatchNorm(group_size=4, momentum=0.0), variables, x)
    alone = [train(BatchNorm(momentum=0.0), variables, part) for part in np.split(x, 3)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in alone]), rtol=1e-5, atol=1e-5)
    for name, found in updated['batch_stats'].items():
        expected = np.mean([stats['batch_stats'][name] for _, stats in alone], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_inference_is_that_of_batch_norm(x, variables):
    y = GhostBatchNorm(group_size=5).apply(variables, x, train=False)
    np.testing.assert_array_equal(y, BatchNorm().apply(variables, x, train=False))


def test_frozen_it_leaves_its_averages(x, variables):
    y, updated = train(GhostBatchNorm(frozen=True), variables, x)
    np.testing.assert_array_equal(y, BatchNorm().apply(variables, x, train=False))
    jax.tree.map(np.testing.assert_array_equal, updated['batch_stats'], variables['batch_stats'])


def test_groups_that_do_not_divide_the_batch_are_a_mistake(x, variables):
    with pytest.raises(UserError, match='groups of 5 examples must divide the batch of 12'):
        train(GhostBatchNorm(group_size=5), variables, x)


def test_bfloat16_inputs_have_float32_statistics(variables):
    x = jnp.asarray(images((12, 5, 4, 3)), jnp.bfloat16)
    y, updated = train(GhostBatchNorm(group_size=4), variables, x)
    assert y.dtype == jnp.bfloat16
    assert updated['batch_stats']['var'].dtype == jnp.float32
