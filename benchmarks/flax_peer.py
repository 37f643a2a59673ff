"""The peer: a step as Flax's examples write it, and VGG16's frozen convolutions of its modules."""

import functools
import importlib.metadata
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState as FlaxState
from flax.traverse_util import unflatten_dict

from benchmarks.problem import VGG16, Problem, backbone_weights, prepared
from benchmarks.worker import Contender, forward


class StockNet(nn.Module):
    """The layers of `cnn_jax.models.StridedNet` from Flax's own modules."""

    stem: int
    widths: tuple[int, ...]
    hidden: int
    outputs: int
    rate: float
    head_rate: float
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, train):
        conv, dense, norm = (
            functools.partial(layer, dtype=self.dtype)
            for layer in (nn.Conv, nn.Dense, nn.BatchNorm)
        )
        norm = functools.partial(norm, use_running_average=not train, momentum=0.99, epsilon=1e-3)
        if self.stem:
            x = conv(self.stem, (7, 7), strides=2, padding='VALID', name='stem_conv')(x)
        for i, width in enumerate(self.widths, start=1):
            for j in (1, 2):
                x = nn.relu(conv(width, (3, 3), strides=j, name=f'block{i}_conv{j}')(x))
                x = norm(name=f'block{i}_norm{j}')(x)
            x = nn.Dropout(self.rate, deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        x = norm(name='norm1')(nn.relu(dense(self.hidden, name='dense1')(x)))
        x = nn.Dropout(self.head_rate, deterministic=not train)(x)
        return dense(self.outputs, name='logits')(x).astype(jnp.float32)


class TrainState(FlaxState):
    """Flax's state with the batch statistics and the key of the dropout masks."""

    batch_stats: dict
    key: jax.Array


def train_step(state: TrainState, images, labels, *, mean, std, l2):
    """One update, and its loss."""
    images = (images.astype(jnp.float32) / 255 - mean) / std

    def objective(weights):
        logits, updated = state.apply_fn(
            {'params': weights, 'batch_stats': state.batch_stats},
            images,
            True,
            rngs={'dropout': jax.random.fold_in(state.key, state.step)},
            mutable=['batch_stats'],
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        squares = [jnp.sum(w['kernel'] ** 2) for name, w in weights.items() if 'conv' in name]
        return each.mean() + l2 * sum(squares), updated['batch_stats']

    grad = jax.value_and_grad(objective, has_aux=True)
    (loss, batch_stats), grads = grad(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def start(problem: Problem) -> Contender:
    """The problem's network in stock Flax, with the problem's weights."""
    net, loss, optimizer = (problem.config[name] for name in ('model', 'loss', 'optimizer'))
    mean, std = (jnp.array(problem.preprocessing[name]) for name in ('mean', 'std'))
    step = jax.jit(
        functools.partial(train_step, mean=mean, std=std, l2=loss['l2']), donate_argnums=0
    )
    batches = jax.device_put(list(zip(problem.images, problem.labels)))

    def initial(rate: float, head_rate: float) -> TrainState:
        (hidden,) = net['hidden']
        model = StockNet(
            net['stem_width'],
            tuple(net['widths']),
            hidden,
            problem.classes,
            rate,
            head_rate,
            net['dtype'],
        )
        paths = {tuple(p.removeprefix('head/').split('/')): w for p, w in problem.weights.items()}
        weights = jax.tree.map(jnp.array, unflatten_dict(paths))
        blank = jnp.zeros((1, *problem.images.shape[2:]))
        drawn = jax.jit(model.init, static_argnums=2)(jax.random.key(0), blank, False)
        assert jax.tree.map(jnp.shape, drawn['params']) == jax.tree.map(jnp.shape, weights)
        return TrainState.create(
            apply_fn=model.apply,
            params=weights,
            tx=optax.adam(optimizer['learning_rate'], eps=optimizer['epsilon']),
            batch_stats=drawn['batch_stats'],
            key=jax.random.key(1),
        )

    state = initial(net['dropout'], net['head_dropout'])
    endless = itertools.cycle(batches)

    def losses(count: int) -> list[float]:
        state, found = initial(0.0, 0.0), []
        for batch in itertools.islice(itertools.cycle(batches), count):
            state, value = step(state, *batch)
            found.append(float(value))
        return found

    def run(count: int) -> None:
        nonlocal state
        for batch in itertools.islice(endless, count):
            state, _ = step(state, *batch)
        jax.block_until_ready(state)

    return Contender(losses, run, f'flax {importlib.metadata.version("flax")}')


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
    version = f'flax {importlib.metadata.version("flax")}'
    return forward(
        lambda x: np.asarray(compute({'params': weights}, x)), list(prepared(problem)), version
    )
