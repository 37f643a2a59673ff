"""Keras's own layer tests, as its wheel brings them, with our computation inside of its layers.

Keras's front end (arguments, weights, `fit`, saving, mixed precision, symbolic shapes) stays; what
a layer computes is ours. Where there is nothing of ours to put in its place, Keras's own runs, and
the reason is noted.
"""

import collections
import functools
import importlib
import math
import unittest
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from keras.src import backend, layers
from keras.src.backend.jax.random import _get_concrete_noise_shape, jax_draw_seed

from cnn_jax import nn

# The least number of cases of each file in which our code must have run.
FILES = {
    'pooling.max_pooling_test': 17,
    'pooling.average_pooling_test': 24,
    'convolutional.conv_test': 23,
    'normalization.batch_normalization_test': 19,
    'normalization.group_normalization_test': 7,
    'normalization.layer_normalization_test': 4,
    'regularization.dropout_test': 4,
    'regularization.spatial_dropout_test': 6,
}
# What cannot be expressed, and why.
LEFT = {
    '3-D': 'images have two axes, signals one',
    'mask': 'every pixel counts in a mean',
    'renorm': 'renormalization averages variances, Keras deviations',
    'RMS': 'no norm leaves the mean',
    'empty': 'there is at least one example of one pixel',
}
Left = type('Left', (Exception,), {})


class Log:
    """What ran since the last case began: our code, or Keras's for a reason."""

    def __init__(self):
        self.ours, self.left = 0, set()


def as_images(x, data_format, *settings):
    """A signal or an image as [b, h, w, c], its settings as pairs, and the way back."""
    if x.ndim > 4:
        raise Left('3-D')
    axes, first = x.ndim - 2, backend.standardize_data_format(data_format) == 'channels_first'
    images = jnp.moveaxis(x, 1, -1) if first else jnp.asarray(x)
    pairs = [(s,) * axes if isinstance(s, int) else tuple(s) for s in settings]

    def back(y):
        y = y[:, 0] if axes == 1 else y
        return jnp.moveaxis(y, -1, 1) if first else y

    images = images[:, None] if axes == 1 else images
    return images, [(1,) * (2 - axes) + pair for pair in pairs], back


def pool(ours, x, pool_size, strides=None, padding='valid', data_format=None):
    sizes = pool_size, pool_size if strides is None else strides
    images, (window, stride), back = as_images(x, data_format, *sizes)
    return back(ours(images, window, stride, padding.upper()))


def convolve(x, kernel, strides=1, padding='valid', data_format=None, dilation_rate=1):
    images, (stride, dilation), back = as_images(x, data_format, strides, dilation_rate)
    kernel = jnp.asarray(kernel)
    taps, groups = kernel.reshape(-1, *kernel.shape[-3:]), images.shape[-1] // kernel.shape[-2]
    options = {'stride': stride, 'dilation': dilation, 'groups': groups}
    return back(nn.conv2d(images.astype(kernel.dtype), taps, padding=padding.upper(), **options))


def scale_and_bias(layer, size) -> tuple[jax.Array, jax.Array]:
    scale = layer.gamma.value.ravel() if layer.gamma is not None else jnp.ones(size)
    return scale, layer.beta.value.ravel() if layer.beta is not None else jnp.zeros(size)


def batch_norm(layer, x, training=None, mask=None):
    if mask is not None or layer.renorm:
        raise Left('renorm' if layer.renorm else 'mask')
    x = jnp.moveaxis(jnp.asarray(x), layer.axis, -1)
    scale, bias = scale_and_bias(layer, x.shape[-1])
    params: dict[str, Any] = {'scale': scale, 'bias': bias}
    stats = {'mean': layer.moving_mean.value, 'var': layer.moving_variance.value}
    train = bool(training and layer.trainable)
    y, updated = nn.BatchNorm(layer.momentum, layer.epsilon, dtype=layer.compute_dtype).apply(
        {'params': params, 'batch_stats': stats}, x, train=train, mutable='batch_stats'
    )
    if train:
        layer.moving_mean.assign(updated['batch_stats']['mean'])
        layer.moving_variance.assign(updated['batch_stats']['var'])
    return jnp.moveaxis(y, -1, layer.axis)


def group_norm(layer, x):
    x = jnp.moveaxis(jnp.asarray(x), layer.axis, -1)
    y = nn.group_normalize(x, *scale_and_bias(layer, x.shape[-1]), layer.groups, layer.epsilon)
    return jnp.moveaxis(y, -1, layer.axis).astype(layer.compute_dtype)


def layer_norm(layer, x):
    """A group norm of one group, to which all other axes are examples."""
    if layer.rms_scaling or not x.size:
        raise Left('RMS' if layer.rms_scaling else 'empty')
    axes = [layer.axis] if isinstance(layer.axis, int) else sorted(layer.axis)
    last = range(-len(axes), 0)
    x = jnp.moveaxis(jnp.asarray(x), axes, last)
    flat = x.reshape(-1, math.prod(x.shape[-len(axes) :]))
    y = nn.group_normalize(flat, *scale_and_bias(layer, flat.shape[1]), 1, layer.epsilon)
    return jnp.moveaxis(y.reshape(x.shape), last, axes).astype(layer.compute_dtype)


def dropout(x, rate, noise_shape=None, seed: Any = None):
    shape = tuple(_get_concrete_noise_shape(x, noise_shape))
    key: Any = jax_draw_seed(seed)
    return nn.dropout(key, x, rate, shape)


PLACES = [
    (backend.nn, 'max_pool', functools.partial(pool, nn.max_pool)),
    (backend.nn, 'average_pool', functools.partial(pool, nn.avg_pool)),
    (backend.nn, 'conv', convolve),
    (layers.BatchNormalization, 'call', batch_norm),
    (layers.GroupNormalization, 'call', group_norm),
    (layers.LayerNormalization, 'call', layer_norm),
    (backend.random, 'dropout', dropout),
]


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_keras_accepts_our_computation_in_its_layers(name, monkeypatch, request):
    request.config.addinivalue_line('markers', 'requires_trainable_backend: Keras has it')
    log, counts, failed = Log(), collections.Counter(), {}
    for owner, attribute, adapter in PLACES:
        theirs = getattr(owner, attribute)

        @functools.wraps(theirs)  # Keras reads the signature of a layer's call
        def ours(*args, adapter=adapter, theirs=theirs, **kwargs):
            try:
                result = adapter(*args, **kwargs)
            except Left as reason:
                log.left.add(str(reason))
                return theirs(*args, **kwargs)
            log.ours += 1
            return result

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
