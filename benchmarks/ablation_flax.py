"""The peer: a run of the ablation as a Flax user writes it. Started by `benchmarks.ablation`.

python -m benchmarks.ablation_flax DATA.npz --seed=0 --dropout=0.25 --norm=batch
"""

import functools
import importlib.metadata
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState as FlaxState
from flax.traverse_util import unflatten_dict

from benchmarks import ablation_peer as peer
from benchmarks.problem import read


class Net(nn.Module):
    """Two pairs of convolutions, a hidden layer and the classifier."""

    dropout: float
    head_dropout: float
    norm: str
    head_norm: str
    norm_momentum: float

    @nn.compact
    def __call__(self, x, train):
        def activate(x, norm, name):
            x = nn.relu(x)
            if norm == 'none':
                return x
            norm = nn.BatchNorm(not train, momentum=self.norm_momentum, epsilon=1e-3, name=name)
            return norm(x)

        he, glorot = nn.initializers.he_normal(), nn.initializers.glorot_uniform()
        drop = functools.partial(nn.Dropout, deterministic=not train)
        for i, width in enumerate((32, 64), start=1):
            for j in (1, 2):
                name = f'block{i}_conv{j}'
                x = nn.Conv(width, (3, 3), strides=j, kernel_init=he, name=name)(x)
                x = activate(x, self.norm, f'block{i}_norm{j}')
            x = drop(self.dropout)(x)
        x = nn.Dense(128, kernel_init=he, name='dense1')(x.reshape(len(x), -1))
        x = drop(self.head_dropout)(activate(x, self.head_norm, 'norm1'))
        return nn.Dense(peer.CLASSES, kernel_init=glorot, name='logits')(x)


class TrainState(FlaxState):
    """Flax's state with the batch statistics and the key of the dropout masks."""

    batch_stats: dict
    key: jax.Array


@functools.partial(jax.jit, static_argnames='l2', donate_argnames='state')
def train_step(state, images, labels, l2):
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


@jax.jit
def count_correct(state, images, labels):
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    logits = state.apply_fn(variables, images, False)
    return jnp.sum(logits.argmax(-1) == labels)


def accuracy(state, x, y):
    parts = peer.batches(x, y, peer.EVALUATION_BATCH)
    return sum(int(count_correct(state, *part)) for part in parts) / len(x)


def make_state(options, rate):
    o = options
    model = Net(o.dropout, o.head_dropout, o.norm, o.head_norm, o.norm_momentum)
    blank = jnp.zeros((1, 28, 28, 1))
    drawn = jax.jit(model.init, static_argnums=2)(jax.random.key(options.seed), blank, False)
    return TrainState.create(
        apply_fn=model.apply,
        params=drawn['params'],
        tx=optax.adam(rate, eps=1e-7),
        batch_stats=drawn.get('batch_stats', {}),
        key=jax.random.key(options.seed + 1),
    )


def train(options):
    """The accuracies of both splits after the last epoch."""
    (x, y), test = peer.images(options.data)
    steps = len(x) // options.batch
    rate = optax.cosine_decay_schedule(options.learning_rate, options.epochs * steps)
    state, order = make_state(options, rate), np.random.default_rng(options.seed)
    for epoch in range(options.epochs):
        losses = []
        for index in order.permutation(len(x)).reshape(steps, options.batch):
            state, loss = train_step(state, x[index], y[index], options.l2)
            losses.append(loss)
        print(f'epoch {epoch + 1}: loss {np.mean(losses):.4f}, test {accuracy(state, *test):.4f}')
    return {'train': accuracy(state, x, y), 'test': accuracy(state, *test)}


def first_losses(options):
    """The losses of a problem's batches from its weights, and what computed them."""
    problem = read(options.losses)
    (x, y), _ = peer.images(options.data)
    paths = {tuple(p.removeprefix('head/').split('/')): w for p, w in problem.weights.items()}
    state = make_state(options, options.learning_rate)
    state = state.replace(params=jax.tree.map(jnp.array, unflatten_dict(paths)))
    losses = []
    for batch in peer.batches(x, y, options.batch) * 2:
        state, loss = train_step(state, *batch, options.l2)
        losses.append(float(loss))
    return {'losses': losses, 'version': f'flax {importlib.metadata.version("flax")}'}


if __name__ == '__main__':
    options = peer.options()
    print(json.dumps(first_losses(options) if options.losses else train(options)))
