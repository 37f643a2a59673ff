"""The peer: the training step as a Keras user writes it, on the backend in KERAS_BACKEND."""

import importlib
import itertools

import keras
from keras import layers

from benchmarks.problem import Problem, kernels, prepared
from benchmarks.worker import Contender


def network(problem: Problem, *, dropout: bool) -> keras.Model:
    """The problem's network with the problem's weights."""
    net = problem.config['model']
    rate, head_rate = (net['dropout'], net['head_dropout']) if dropout else (0.0, 0.0)
    penalty = keras.regularizers.L2(problem.config['loss']['l2'])

    def conv(x, *window, name):
        return layers.Conv2D(*window, kernel_regularizer=penalty, name=name)(x)

    def activated(x, name):
        norm = layers.BatchNormalization(
            momentum=net['norm_momentum'], epsilon=net['norm_epsilon'], name=name
        )
        return norm(layers.ReLU()(x))

    inputs = x = keras.Input((*problem.images.shape[2:-1], problem.preprocessing['channels']))
    if net['stem_width']:
        x = conv(x, net['stem_width'], 7, 2, 'valid', name='stem_conv')
    for i, width in enumerate(net['widths'], start=1):
        for j in (1, 2):
            x = conv(x, width, 3, j, 'same', name=f'block{i}_conv{j}')
            x = activated(x, f'block{i}_norm{j}')
        x = layers.Dropout(rate)(x)
    (hidden,) = net['hidden']
    x = activated(layers.Dense(hidden, name='dense1')(layers.Flatten()(x)), 'norm1')
    x = layers.Dropout(head_rate)(x)
    model = keras.Model(inputs, layers.Dense(problem.classes, name='logits')(x))
    for name, kernel in kernels(problem).items():
        model.get_layer(name).kernel.assign(kernel)
    return model


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
        model = network(problem, dropout=dropout)
        model.compile(
            keras.optimizers.Adam(optimizer['learning_rate'], epsilon=optimizer['epsilon']),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=backend == 'jax',
        )
        return model

    model, endless = compiled(dropout=True), itertools.cycle(batches)

    def losses(count: int) -> list[float]:
        model, found = compiled(dropout=False), []
        for batch in itertools.islice(itertools.cycle(batches), count):
            model.reset_metrics()  # else they are means over all batches so far
            found.append(float(model.train_on_batch(*batch)))
        return found

    def run(count: int) -> None:
        for batch in itertools.islice(endless, count):
            model.train_on_batch(*batch)

    return Contender(losses, run, version())


def version() -> str:
    """Of Keras and its backend."""
    backend = keras.config.backend()
    return f'keras {keras.__version__} on {backend} {importlib.import_module(backend).__version__}'
