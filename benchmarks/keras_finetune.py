"""The peer: the same fine-tuning as a Keras user writes it. Run by `benchmarks.finetune`.

  KERAS_BACKEND=jax python benchmarks/keras_finetune.py PHOTOS WEIGHTS.npz [--cached]

Imports nothing of this project. With --cached the features are computed once by hand.
"""

import sys
import time
from pathlib import Path

import keras
import numpy as np
from PIL import Image


def images(folder):
    paths = sorted(Path(folder).glob('*/*'))
    names = sorted({path.parent.name for path in paths})
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in paths])
    return pixels.astype(np.float32), np.array([names.index(path.parent.name) for path in paths])


def main():
    photos, weights, *options = sys.argv[1:]
    (x, y), (test_x, test_y) = (images(Path(photos) / split) for split in ('train', 'test'))
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(224, 224, 3))
    with np.load(weights) as given:
        for layer in base.layers:
            if layer.weights:
                layer.set_weights([given[f'{layer.name}/kernel'], given[f'{layer.name}/bias']])
    base.trainable = False
    head = keras.Sequential(
        [
            keras.Input(base.output_shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(1024, activation='relu', kernel_initializer='he_normal'),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1, activation='sigmoid'),
        ]
    )
    x, test_x = (keras.applications.vgg16.preprocess_input(a) for a in (x, test_x))
    if '--cached' in options:
        x, test_x = (base.predict(a, batch_size=32, verbose=0) for a in (x, test_x))
        model = head
    else:
        model = keras.Sequential([base, head])
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9), 'binary_crossentropy', metrics=['accuracy']
    )
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


if __name__ == '__main__':
    main()
