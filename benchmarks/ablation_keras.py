"""The peer: a run of the ablation as a Keras user writes it. Started by `benchmarks.ablation`.

KERAS_BACKEND=jax python -m benchmarks.ablation_keras DATA.npz --seed=0 --dropout=0.25 --norm=batch
"""

import importlib
import json

import keras
from keras import layers

from benchmarks import ablation_peer as peer
from benchmarks.problem import read


def make_model(options, rate):
    """Two pairs of convolutions, a hidden layer and the classifier, compiled."""

    def activated(norm, name):
        batch_norm = layers.BatchNormalization(momentum=options.norm_momentum, name=name)
        return [layers.ReLU(), *[batch_norm] * (norm == 'batch')]

    stack = [keras.Input((28, 28, 1))]
    for i, width in enumerate((32, 64), start=1):
        for j in (1, 2):
            conv = layers.Conv2D(
                width,
                3,
                strides=j,
                padding='same',
                kernel_initializer='he_normal',
                kernel_regularizer=keras.regularizers.L2(options.l2) if options.l2 else None,
                name=f'block{i}_conv{j}',
            )
            stack += [conv, *activated(options.norm, f'block{i}_norm{j}')]
        stack += [layers.Dropout(options.dropout)] * (options.dropout > 0)
    stack += [
        layers.Flatten(),
        layers.Dense(128, kernel_initializer='he_normal', name='dense1'),
        *activated(options.head_norm, 'norm1'),
        *[layers.Dropout(options.head_dropout)] * (options.head_dropout > 0),
        layers.Dense(peer.CLASSES, name='logits'),
    ]
    model = keras.Sequential(stack)
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
    problem = read(options.losses)
    (x, y), _ = peer.images(options.data)
    model = make_model(options, options.learning_rate)
    for path, weights in problem.weights.items():
        *_, layer, name = path.split('/')
        if name == 'kernel':  # the others start at 0 or 1, here, too
            model.get_layer(layer).kernel.assign(weights)
    losses = []
    for batch in peer.batches(x, y, options.batch) * 2:
        model.reset_metrics()  # else they are means over all batches so far
        loss, _ = model.train_on_batch(*batch)
        losses.append(float(loss))
    backend = keras.config.backend()
    version = importlib.import_module(backend).__version__
    return {'losses': losses, 'version': f'keras {keras.__version__} on {backend} {version}'}


if __name__ == '__main__':
    options = peer.options()
    print(json.dumps(first_losses(options) if options.losses else train(options)))
