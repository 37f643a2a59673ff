"""The public names of `cnn_jax.nn`: examples, and use in a net of one's own."""

import doctest
import inspect

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnn_jax import nn
from tests.environments import on_devices


@pytest.mark.parametrize('name', nn.__all__)
def test_every_public_name_has_an_example_that_runs(name):
    item = getattr(nn, name)
    text = inspect.getdoc(item) or ''
    example = doctest.DocTestParser().get_doctest(
        text, {'nn': nn, 'jax': jax, 'jnp': jnp}, name, None, 0
    )
    assert example.examples
    report: list[str] = []
    with jax.numpy_dtype_promotion('standard'):
        doctest.DocTestRunner().run(example, out=report.append)
    assert not report, ''.join(report)


@pytest.fixture
def standard():
    """The promotion that a user has: Optax and NNX are not written for the strict one."""
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        yield


class Net(flax.linen.Module):
    """A user's own: our layers beside Flax's, called as either of the two calls them."""

    @flax.linen.compact
    def __call__(self, x, *, train: bool):
        x = nn.BatchNorm()(jax.nn.relu(nn.Conv(8)(x)), train=train)
        x = nn.Dropout(0.25)(nn.max_pool(x, 2), deterministic=not train)
        x = nn.GroupNorm(2)(nn.Conv(8, strides=2)(x))
        return flax.linen.Dense(2)(nn.global_avg_pool(x))


def problem():
    labels = np.arange(32) % 2
    noise = np.random.default_rng(0).normal(size=(32, 8, 8, 1))
    images = noise + np.where(labels, 1, -1).reshape(-1, 1, 1, 1)
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.usefixtures('standard')
def test_it_trains_a_step_as_an_nnx_module():
    x, y = problem()
    model = nnx.bridge.ToNNX(Net(), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(model, x, train=False)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    def loss(model, rngs):
        return cross_entropy(model(x, train=True, rngs=rngs, mutable=['batch_stats']), y)

    first, grads = nnx.jit(nnx.value_and_grad(loss))(model, nnx.Rngs(dropout=1))
    optimizer.update(model, grads)
    assert np.isfinite(first)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(model, nnx.Param))
    assert any(jax.tree.leaves(changed))


DIVIDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.nn.test_public import Net, cross_entropy, problem

x, y = problem()
variables = Net().init(jax.random.key(0), x, train=False)
held = {'batch_stats': variables['batch_stats']}

def loss(params, x, y):
    rngs, changed = {'dropout': jax.random.key(1)}, ['batch_stats']
    logits, _ = Net().apply(held | {'params': params}, x, train=True, rngs=rngs, mutable=changed)
    return cross_entropy(logits, y)

def close(found, expected):
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)

params, gradient, alone = variables['params'], jax.grad(loss), jax.jit(jax.grad(loss))
explicit, auto = (jax.make_mesh((2,), ('d',), (AxisType[n],)) for n in ('Explicit', 'Auto'))
with jax.set_mesh(explicit):
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(explicit, spec))
    found = jax.jit(gradient)(place(params, P()), place(x, P('d')), place(y, P('d')))
close(found, alone(params, x, y))
with jax.set_mesh(auto):  # the sum over both halves, each with statistics of its own
    specs = P(), P('d'), P('d')
    found = jax.jit(jax.shard_map(gradient, in_specs=specs, out_specs=P()))(params, x, y)
halves = [alone(params, x[half], y[half]) for half in (slice(16), slice(16, None))]
close(found, jax.tree.map(lambda a, b: a + b, *halves))
"""


def test_two_devices_give_its_gradients_along_explicit_axes_and_in_a_shard_map():
    on_devices(2, DIVIDED)
