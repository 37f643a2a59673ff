"""One regularizer against none, in one file: does dropout help a small net on few digits?

    python minimal.py            # 20 pairs of runs
    python minimal.py --pairs 3 --epochs 2

Yes: trained on 500 of the 1,797 digits (8×8) and tested on the other 1,297, dropout (0.25 after
each convolution, 0.5 before the classifier) raised accuracy from 96.78% to 97.11%, by 0.33 points
(95% interval 0.15 to 0.51, p = 0.001) and lowered the loss from 0.107 to 0.092 nats, by 0.015
(0.011 to 0.020, p = 3e-6). n = 20 pairs, each with training images, initial weights and order of
its own, at one learning rate that was chosen for neither arm. Measured on 2026-11-30 on two Zen 5
cores, 2 threads, with JAX 0.10.2, Flax 0.12.8, Optax 0.2.8, in 14 seconds.

Nothing is hidden: data, network, loss, optimizer, loop and statistics are below. Only the layers
are of the package. `cnn_jax.ablate` does the same with tuning, resuming, records and a report.
"""

import argparse
from functools import partial

import flax.linen as linen
import jax
import numpy as np
import optax
from scipy import stats

from cnn_jax import nn, runtime
from cnn_jax.data.sources import digits

TRAIN, BATCH, RATE, PEAK = 500, 50, 0.25, 3e-3  # images, images a step, dropout, learning rate


def load():
    """The 1,797 digits of 8×8 pixels as images in −1…1 and labels."""
    source = digits()
    images, labels = zip(*(source[i] for i in range(len(source))))
    return np.stack(images).astype(np.float32) / 127.5 - 1, np.array(labels)


class Net(linen.Module):
    """Conv → ReLU → BatchNorm twice, a stride of 2 between, dropout before the classifier."""

    rate: float

    @linen.compact
    def __call__(self, x, *, train):
        for width, stride in ((16, 1), (32, 2)):
            x = nn.Conv(width, 3, strides=stride, padding='SAME')(x)
            x = nn.BatchNorm(momentum=0.9)(linen.relu(x), train=train)
            x = nn.Dropout(self.rate)(x, train=train)
        x = linen.relu(linen.Dense(64)(x.reshape(len(x), -1)))
        x = nn.Dropout(2 * self.rate)(x, train=train)
        return linen.Dense(10)(x)


def loss(params, stats, rate, key, images, labels):
    """Mean cross-entropy in nats, and the batch norms' new running statistics."""
    logits, updated = Net(rate).apply(
        {'params': params, 'batch_stats': stats},
        images,
        train=True,
        rngs={'dropout': key},
        mutable=['batch_stats'],
    )
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return entropy, updated['batch_stats']


@partial(jax.jit, static_argnames='tx')
def step(tx, params, stats, memory, rate, key, images, labels):
    """One update; the rate is traced, so one compilation serves both arms."""
    gradients, stats = jax.grad(loss, has_aux=True)(params, stats, rate, key, images, labels)
    updates, memory = tx.update(gradients, memory, params)
    return optax.apply_updates(params, updates), stats, memory


@jax.jit
def evaluate(params, stats, images, labels):
    """Accuracy and negative log-likelihood at inference."""
    logits = Net(0.0).apply({'params': params, 'batch_stats': stats}, images, train=False)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return (logits.argmax(-1) == labels).mean(), entropy


def run(tx, rate, seed, epochs, images, labels):
    """Train one net; the seed draws training images, initial weights, order and masks.

    Both arms of a pair have the same seed, so that they differ in nothing but the rate.
    """
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(images))
    train, test = chosen[:TRAIN], chosen[TRAIN:]
    order = np.concatenate([draw.permutation(train) for _ in range(epochs)])
    order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    key = jax.random.key(seed)
    variables = Net(rate).init(key, images[:1], train=False)
    params, stats = variables['params'], variables['batch_stats']
    memory = tx.init(params)
    for number, index in enumerate(order):
        now = jax.random.fold_in(key, number)
        params, stats, memory = step(
            tx, params, stats, memory, rate, now, images[index], labels[index]
        )
    return np.array(evaluate(params, stats, images[test], labels[test]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=20)
    parser.add_argument('--epochs', type=int, default=30)
    args = parser.parse_args()
    print(runtime.configure())
    images, labels = load()
    tx = optax.adam(optax.cosine_decay_schedule(PEAK, args.epochs * TRAIN // BATCH))
    results = []
    for seed in range(args.pairs):
        pair = [run(tx, rate, seed, args.epochs, images, labels) for rate in (0.0, RATE)]
        results.append(pair)
        accuracies = ' and '.join(f'{accuracy:.2%}' for accuracy, _ in pair)
        print(f'seed {seed:2}: {accuracies} without and with dropout', flush=True)
    results = np.array(results)  # [pairs, arms, measures]
    for name, unit, scale, column in (('accuracy', 'points', 100, 0), ('loss', 'nats', 1, 1)):
        difference = scale * (results[:, 1, column] - results[:, 0, column])
        test = stats.ttest_1samp(difference, 0.0)
        low, high = test.confidence_interval()
        arms = scale * results[:, :, column].mean(axis=0)
        print(
            f'{name}: {arms[0]:.3f} without, {arms[1]:.3f} with dropout; difference '
            f'{difference.mean():+.3f} {unit} (95% interval {low:+.3f} to {high:+.3f}, '
            f'p = {test.pvalue:.2g}, {args.pairs} pairs)'
        )


if __name__ == '__main__':
    main()
