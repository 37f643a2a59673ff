"""The peer: the same fine-tuning as a Keras user writes it. Run by `benchmarks.finetune`.

  KERAS_BACKEND=jax python -m benchmarks.keras_finetune PHOTOS WEIGHTS.npz [--cached]

With --cached the features are computed once by hand.
"""

import itertools
import sys
import time
from pathlib import Path

import keras
import numpy as np
from PIL import Image

from benchmarks.keras_step import version
from benchmarks.problem import Problem, backbone_weights, caffe, prepared
from benchmarks.worker import Contender


def images(folder):
    paths = sorted(Path(folder).glob('*/*'))
    names = sorted({path.parent.name for path in paths})
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in paths])
    return pixels.astype(np.float32), np.array([names.index(path.parent.name) for path in paths])


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


def compiled(model):
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
    model.compile(optimizer, 'binary_crossentropy', metrics=['accuracy'])
    return model


def main():
    photos, weights, *options = sys.argv[1:]
    (x, y), (test_x, test_y) = (images(Path(photos) / split) for split in ('train', 'test'))
    with np.load(weights) as given:
        base = backbone(given)
    head = new_head(base.output_shape[1:])
    x, test_x = caffe(x), caffe(test_x)
    if '--cached' in options:
        x, test_x = (base.predict(a, batch_size=32, verbose=0) for a in (x, test_x))
        model = compiled(head)
    else:
        model = compiled(keras.Sequential([base, head]))
    ends = [time.perf_counter()]
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter())
    )
    fitted = model.fit(
        x,
        y,
        batch_size=32,
        epochs=10,
        validation_data=(test_x, test_y),
        verbose=0,
        callbacks=[watch],
    )
    print(np.median(np.diff(ends)[1:]), fitted.history['val_accuracy'][-1])


def start(problem: Problem) -> Contender:
    """For the gate: the problem's weights, head included, and no dropout."""
    batches = list(zip(prepared(problem), problem.labels))

    def losses(count: int) -> list[float]:
        base = backbone(backbone_weights(problem))
        head = new_head(base.output_shape[1:], dropout=0.0)
        for layer, name in zip((x for x in head.layers if x.weights), ('dense1', 'logits')):
            layer.set_weights(
                [problem.weights[f'head/{name}/{part}'] for part in ('kernel', 'bias')]
            )
        model = compiled(keras.Sequential([base, head]))
        found = []
        for batch in itertools.islice(itertools.cycle(batches), count):
            model.reset_metrics()  # else they are means over all batches so far
            found.append(float(model.train_on_batch(*batch)[0]))
        return found

    return Contender(losses, lambda count: None, version())


if __name__ == '__main__':
    main()
