"""The peer: a run of the ablation as a Keras user writes it. Started by `benchmarks.ablation`.

KERAS_BACKEND=jax python -m benchmarks.ablation_keras DATA.npz --seed=0 --dropout=0.25 --norm=batch
"""

import json

import keras

from benchmarks import ablation_peer as peer
from benchmarks import keras_peer
from benchmarks.problem import read


def make_model(options, rate):
    """The network, compiled."""
    model = keras_peer.network(peer.net(options), options.l2, (28, 28, 1), peer.CLASSES)
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=['accuracy'],
        # XLA makes TensorFlow slower here: 20 epochs take 48 processor seconds instead of 20.
        jit_compile=keras.config.backend() == 'jax',
    )
    return model


def train(options):
    """The accuracies of both splits after the last epoch."""
    keras.utils.set_random_seed(options.seed)
    (x, y), test = peer.images(options.data)
    steps = options.epochs * len(x) // options.batch
    rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)
    model = make_model(options, rate)
    model.fit(
        x,
        y,
        batch_size=options.batch,
        epochs=options.epochs,
        validation_data=test,
        validation_batch_size=peer.EVALUATION_BATCH,
        verbose=2,
    )
    splits = {'train': (x, y), 'test': test}
    size = peer.EVALUATION_BATCH
    return {
        name: float(model.evaluate(*split, batch_size=size, verbose=0)[1])
        for name, split in splits.items()
    }


def first_losses(options):
    """The losses of a problem's batches from its weights, and what computed them."""
    (x, y), _ = peer.images(options.data)
    model = make_model(options, options.learning_rate)
    keras_peer.set_kernels(model, read(options.losses))
    losses = keras_peer.first_losses(model, peer.batches(x, y, options.batch) * 2)
    return {'losses': losses, 'version': keras_peer.version()}


if __name__ == '__main__':
    options = peer.options()
    print(json.dumps(first_losses(options) if options.losses else train(options)))
