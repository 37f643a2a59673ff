"""The peer: a step as Flax's examples write it, and VGG16's frozen convolutions of its modules."""

import functools
import importlib.metadata
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict
from flax.training.train_state import TrainState as FlaxState
from flax.traverse_util import unflatten_dict

from benchmarks.problem import VGG16, Problem, backbone_weights, prepared
from benchmarks.worker import Contender, forward


class StockNet(nn.Module):
    """The layers of `cnn_jax.models.StridedNet` from Flax's own modules.

    `net` has the fields of `cnn_jax.config.Model`; rates of None are its own.
    """

    net: FrozenDict
    outputs: int
    rate: float | None = None

    @nn.compact
    def __call__(self, x, train):
        net, glorot = self.net, nn.initializers.glorot_uniform()
        conv, dense, norm = (
            functools.partial(layer, dtype=net.get('dtype', 'float32'))
            for layer in (nn.Conv, nn.Dense, nn.BatchNorm)
        )
        conv, dense = (
            functools.partial(f, kernel_init=nn.initializers.he_normal()) for f in (conv, dense)
        )

        def activated(x, kind, name):
            x = nn.relu(x)
            if kind == 'none':
                return x
            return norm(not train, momentum=net['norm_momentum'], epsilon=1e-3, name=name)(x)

        def dropped(x, rate):
            rate = rate if self.rate is None else self.rate
            return nn.Dropout(rate, deterministic=not train)(x)

        if net['stem_width']:
            x = conv(net['stem_width'], (7, 7), strides=2, padding='VALID', name='stem_conv')(x)
        for i, width in enumerate(net['widths'], start=1):
            for j in (1, 2):
                x = conv(width, (3, 3), strides=j, name=f'block{i}_conv{j}')(x)
                x = activated(x, net['norm'], f'block{i}_norm{j}')
            x = dropped(x, net['dropout'])
        (hidden,) = net['hidden']
        x = dense(hidden, name='dense1')(x.reshape(len(x), -1))
        x = dropped(activated(x, net['head_norm'], 'norm1'), net['head_dropout'])
        return dense(self.outputs, kernel_init=glorot, name='logits')(x).astype(jnp.float32)


class TrainState(FlaxState):
    """Flax's state with the batch statistics and the key of the dropout masks."""

    batch_stats: dict
    key: jax.Array


def make_state(model: StockNet, shape: tuple[int, ...], tx, seed: int = 0, weights=None):
    """A state for images of a shape, with the weights of a problem or drawn ones."""
    drawn = jax.jit(model.init, static_argnums=2)(
        jax.random.key(seed), jnp.zeros((1, *shape)), False
    )
    params = drawn['params']
    if weights is not None:
        paths = {tuple(p.removeprefix('head/').split('/')): w for p, w in weights.items()}
        weights = jax.tree.map(jnp.array, unflatten_dict(paths))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, weights)
        params = weights
    stats, key = drawn.get('batch_stats', {}), jax.random.key(seed + 1)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=stats, key=key)


def train_step(state: TrainState, images, labels, l2, mean=0.0, std=1.0):
    """One update, and its loss."""
    images = (images.astype(jnp.float32) - mean) / std

    def objective(weights):
        logits, updated = state.apply_fn(
            {'params': weights, 'batch_stats': state.batch_stats},
            images,
            True,
            rngs={'dropout': jax.random.fold_in(state.key, state.step)},
            mutable=['batch_stats'],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if l2:
            squares = [jnp.sum(w['kernel'] ** 2) for name, w in weights.items() if 'conv' in name]
            loss += l2 * sum(squares)
        return loss, updated.get('batch_stats', {})

    grad = jax.value_and_grad(objective, has_aux=True)
    (loss, batch_stats), grads = grad(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


VERSION = f'flax {importlib.metadata.version("flax")}'


def start(problem: Problem) -> Contender:
    """The problem's network in stock Flax, with the problem's weights."""
    net, loss, optimizer = (problem.config[name] for name in ('model', 'loss', 'optimizer'))
    mean, std = (255 * jnp.array(problem.preprocessing[name]) for name in ('mean', 'std'))
    step = jax.jit(
        functools.partial(train_step, mean=mean, std=std, l2=loss['l2']), donate_argnums=0
    )
    batches = jax.device_put(list(zip(problem.images, problem.labels)))

    def initial(rate: float | None = None) -> TrainState:
        hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in net.items()}
        model = StockNet(FrozenDict(hashable), problem.classes, rate)
        tx = optax.adam(optimizer['learning_rate'], eps=optimizer['epsilon'])
        return make_state(model, problem.images.shape[2:], tx, weights=problem.weights)

    state, endless = initial(), itertools.cycle(batches)

    def losses(count: int) -> list[float]:
        state, found = initial(rate=0.0), []
        for batch in itertools.islice(itertools.cycle(batches), count):
            state, value = step(state, *batch)
            found.append(float(value))
        return found

    def run(count: int) -> None:
        nonlocal state
        for batch in itertools.islice(endless, count):
            state, _ = step(state, *batch)
        jax.block_until_ready(state)

    return Contender(losses, run, VERSION)


class Backbone(nn.Module):
    """The thirteen convolutions and five poolings."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        for i, (width, count) in enumerate(VGG16, start=1):
            for j in range(1, count + 1):
                x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f'block{i}_conv{j}')(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return x


def features(problem: Problem) -> Contender:
    """Prepared images in, features out."""
    weights = jax.device_put(unflatten_dict(backbone_weights(problem), sep='/'))
    compute = jax.jit(Backbone(problem.config['model']['dtype']).apply)
    return forward(
        lambda x: np.asarray(compute({'params': weights}, x)), list(prepared(problem)), VERSION
    )
