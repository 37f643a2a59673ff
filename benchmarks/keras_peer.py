"""The peer: a step, features and a fine-tuning as a Keras user writes them.

The backend is in KERAS_BACKEND. `benchmarks.finetune` runs the last as a script, with --cached on
features that are computed once by hand:

  KERAS_BACKEND=jax python -m benchmarks.keras_peer PHOTOS WEIGHTS.npz [--cached]
"""

import importlib
import itertools
import sys
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers

from benchmarks.problem import Problem, backbone_weights, kernels, photographs, prepared
from benchmarks.worker import Contender, forward


def network(net: dict, l2: float, shape: tuple[int, ...], classes: int) -> keras.Model:
    """The network of `cnn_jax.config.Model`'s fields for images of a shape."""
    penalty = keras.regularizers.L2(l2) if l2 else None

    def activated(x, kind, name):
        x = layers.ReLU()(x)
        if kind == 'none':
            return x
        momentum, epsilon = net['norm_momentum'], net['norm_epsilon']
        return layers.BatchNormalization(momentum=momentum, epsilon=epsilon, name=name)(x)

    def conv(x, *window, name):
        layer = layers.Conv2D(
            *window, kernel_initializer='he_normal', kernel_regularizer=penalty, name=name
        )
        return layer(x)

    def dropped(x, rate):
        return layers.Dropout(rate)(x) if rate else x

    inputs = x = keras.Input(shape)
    if net['stem_width']:
        x = conv(x, net['stem_width'], 7, 2, 'valid', name='stem_conv')
    for i, width in enumerate(net['widths'], start=1):
        for j in (1, 2):
            x = conv(x, width, 3, j, 'same', name=f'block{i}_conv{j}')
            x = activated(x, net['norm'], f'block{i}_norm{j}')
        x = dropped(x, net['dropout'])
    (hidden,) = net['hidden']
    x = layers.Dense(hidden, kernel_initializer='he_normal', name='dense1')(layers.Flatten()(x))
    x = dropped(activated(x, net['head_norm'], 'norm1'), net['head_dropout'])
    return keras.Model(inputs, layers.Dense(classes, name='logits')(x))


def set_kernels(model: keras.Model, problem: Problem) -> None:
    """Assign the problem's initial weights; the others start at 0 or 1, here, too."""
    for name, kernel in kernels(problem).items():
        model.get_layer(name).kernel.assign(kernel)


def first_losses(model: keras.Model, batches) -> list[float]:
    """The losses of an update on each batch."""
    found = []
    for batch in batches:
        model.reset_metrics()  # else they are means over all batches so far
        found.append(float(np.ravel(model.train_on_batch(*batch))[0]))
    return found


def start(problem: Problem) -> Contender:
    """The problem's training step in Keras."""
    backend, optimizer = keras.config.backend(), problem.config['optimizer']
    batches = list(zip(prepared(problem), problem.labels))

    # train_on_batch, compiled with JAX alone, is the best of, in ms a step of small28:
    #                               JAX   TensorFlow   PyTorch
    # train_on_batch, jit_compile    60          179       118
    # train_on_batch                              39        58
    # fit (JAX: jit_compile)         75           65        60
    # fit, steps_per_execution=5     68           39   refused
    def compiled(*, dropout: bool) -> keras.Model:
        net = problem.config['model'] | ({} if dropout else {'dropout': 0, 'head_dropout': 0})
        shape = *problem.images.shape[2:-1], problem.preprocessing['channels']
        model = network(net, problem.config['loss']['l2'], shape, problem.classes)
        set_kernels(model, problem)
        model.compile(
            keras.optimizers.Adam(optimizer['learning_rate'], epsilon=optimizer['epsilon']),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=backend == 'jax',
        )
        return model

    model, endless = compiled(dropout=True), itertools.cycle(batches)

    def losses(count: int) -> list[float]:
        return first_losses(
            compiled(dropout=False), itertools.islice(itertools.cycle(batches), count)
        )

    def run(count: int) -> None:
        for batch in itertools.islice(endless, count):
            model.train_on_batch(*batch)

    return Contender(losses, run, version())


def version() -> str:
    """Of Keras and its backend."""
    backend = keras.config.backend()
    return f'keras {keras.__version__} on {backend} {importlib.import_module(backend).__version__}'


def features(problem: Problem) -> Contender:
    """Prepared images in, features out."""
    model = backbone(backbone_weights(problem))
    model.compile(jit_compile=keras.config.backend() == 'jax')
    return forward(model.predict_on_batch, list(prepared(problem)), version())


def backbone(given):
    """The frozen convolutions with the `given` weights."""
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(224, 224, 3))
    for layer in base.layers:
        if layer.weights:
            layer.set_weights([given[f'{layer.name}/kernel'], given[f'{layer.name}/bias']])
    base.trainable = False
    return base


def new_head(shape, dropout=0.5):
    """What is trained, on features of that shape."""
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(1024, activation='relu', kernel_initializer='he_normal'),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(1, activation='sigmoid'),
        ]
    )


def to_finetune(model):
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
    model.compile(optimizer, 'binary_crossentropy', metrics=['accuracy'])
    return model


def main():
    photos, weights, *options = sys.argv[1:]
    (x, y), (test_x, test_y) = (photographs(Path(photos) / split) for split in ('train', 'test'))
    with np.load(weights) as given:
        base = backbone(given)
    head = new_head(base.output_shape[1:])
    if '--cached' in options:
        x, test_x = (base.predict(a, batch_size=32, verbose=0) for a in (x, test_x))
        model = to_finetune(head)
    else:
        model = to_finetune(keras.Sequential([base, head]))
    ends = [time.perf_counter()]
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter())
    )
    options = {'batch_size': 32, 'epochs': 10, 'verbose': 0, 'callbacks': [watch]}
    fitted = model.fit(x, y, validation_data=(test_x, test_y), **options)
    print(np.median(np.diff(ends)[1:]), fitted.history['val_accuracy'][-1])


def finetune(problem: Problem) -> Contender:
    """For the gate: the problem's weights, head included, and no dropout."""
    batches = list(zip(prepared(problem), problem.labels))

    def losses(count: int) -> list[float]:
        base = backbone(backbone_weights(problem))
        head = new_head(base.output_shape[1:], dropout=0.0)
        for layer, name in zip((x for x in head.layers if x.weights), ('dense1', 'logits')):
            layer.set_weights(
                [problem.weights[f'head/{name}/{part}'] for part in ('kernel', 'bias')]
            )
        model = to_finetune(keras.Sequential([base, head]))
        return first_losses(model, itertools.islice(itertools.cycle(batches), count))

    return Contender(losses, lambda count: None, version())


if __name__ == '__main__':
    main()
