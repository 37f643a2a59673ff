"""The peer: a run of the ablation as a Flax user writes it. Started by `benchmarks.ablation`.

python -m benchmarks.ablation_flax DATA.npz --seed=0 --dropout=0.25 --norm=batch
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict

from benchmarks import ablation_peer as peer
from benchmarks import flax_peer
from benchmarks.problem import read

train_step = jax.jit(flax_peer.train_step, static_argnames='l2', donate_argnames='state')


@jax.jit
def count_correct(state, images, labels):
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    logits = state.apply_fn(variables, images, False)
    return jnp.sum(logits.argmax(-1) == labels)


def accuracy(state, x, y):
    parts = peer.batches(x, y, peer.EVALUATION_BATCH)
    return sum(int(count_correct(state, *part)) for part in parts) / len(x)


def make_state(options, rate, weights=None):
    model = flax_peer.StockNet(FrozenDict(peer.net(options)), peer.CLASSES)
    tx = optax.adam(rate, eps=1e-7)
    return flax_peer.make_state(model, (28, 28, 1), tx, options.seed, weights)


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
    state = make_state(options, options.learning_rate, problem.weights)
    losses = []
    for batch in peer.batches(x, y, options.batch) * 2:
        state, loss = train_step(state, *batch, options.l2)
        losses.append(float(loss))
    return {'losses': losses, 'version': flax_peer.VERSION}


if __name__ == '__main__':
    options = peer.options()
    print(json.dumps(first_losses(options) if options.losses else train(options)))
