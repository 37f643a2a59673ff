"""Keras's own layer tests, as its wheel brings them, with our computation inside of its layers.

Keras's front end (arguments, weights, `fit`, saving, mixed precision, symbolic shapes) stays; what
a layer computes is ours. Where there is nothing of ours to put in its place, Keras's own runs, and
the reason is noted.
"""

import collections
import functools
import importlib
import unittest

import jax
import jax.numpy as jnp
import pytest
from keras.src import backend

from cnn_jax import nn

# The least number of cases of each file in which our code must have run.
FILES = {'pooling.max_pooling_test': 17, 'pooling.average_pooling_test': 24}
# What cannot be expressed, and why.
LEFT = {'3-D': 'images have two axes, signals one'}


class Log:
    """What ran since the last case began: our code, or Keras's for a reason."""

    def __init__(self):
        self.ours, self.left = 0, set()


def as_images(x, data_format, *settings):
    """A signal or an image as [b, h, w, c], its settings as pairs, and the way back."""
    axes, first = x.ndim - 2, backend.standardize_data_format(data_format) == 'channels_first'
    images = jnp.moveaxis(x, 1, -1) if first else jnp.asarray(x)
    pairs = [(s,) * axes if isinstance(s, int) else tuple(s) for s in settings]

    def back(y):
        y = y[:, 0] if axes == 1 else y
        return jnp.moveaxis(y, -1, 1) if first else y

    images = images[:, None] if axes == 1 else images
    return images, [(1,) * (2 - axes) + pair for pair in pairs], back


def pool(ours, log, theirs, x, pool_size, strides=None, padding='valid', data_format=None):
    if x.ndim > 4:
        log.left.add('3-D')
        return theirs(x, pool_size, strides, padding, data_format)
    log.ours += 1
    sizes = pool_size, pool_size if strides is None else strides
    images, (window, stride), back = as_images(x, data_format, *sizes)
    return back(ours(images, window, stride, padding.upper()))


PLACES = [
    (backend.nn, 'max_pool', functools.partial(pool, nn.max_pool)),
    (backend.nn, 'average_pool', functools.partial(pool, nn.avg_pool)),
]


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_keras_accepts_our_computation_in_its_layers(name, monkeypatch):
    log, counts, failed = Log(), collections.Counter(), {}
    for owner, attribute, adapter in PLACES:
        theirs = getattr(owner, attribute)

        @functools.wraps(theirs)  # Keras reads the signature of a layer's call
        def ours(*args, adapter=adapter, theirs=theirs, **kwargs):
            return adapter(log, theirs, *args, **kwargs)

        monkeypatch.setattr(owner, attribute, ours)

    class Result(unittest.TestResult):
        def startTest(self, test):
            super().startTest(test)
            log.ours, log.left = 0, set()

        def stopTest(self, test):
            super().stopTest(test)
            counts['mapped'] += log.ours > 0
            counts.update(log.left)
            for kept, reason in (*self.errors, *self.failures):
                if kept is test and log.ours:
                    failed[test.id()] = reason

    module = importlib.import_module(f'keras.src.layers.{name}')
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        unittest.defaultTestLoader.loadTestsFromModule(module).run(Result())
    print(name, dict(counts))
    assert not failed, '\n'.join(f'{case}: {reason}' for case, reason in failed.items())
    assert counts['mapped'] >= FILES[name], counts
    assert counts.keys() - {'mapped'} <= LEFT.keys()
