"""The parameters' names, shapes and digest, against counts in the paper and by hand."""

import hashlib
import math

import numpy as np

from cnn_jax.pretrained.layout import digest, shapes
from cnn_jax.pretrained.sources import IMAGENET


def test_counts_are_those_of_configuration_d():
    assert sum(math.prod(shape) for shape in shapes().values()) == 14_714_688
    assert sum(math.prod(shape) for shape in shapes(include_top=True).values()) == 138_357_544


def test_order_is_that_of_the_layers():
    names = list(shapes(include_top=True))
    assert names[:3] == ['block1_conv1/kernel', 'block1_conv1/bias', 'block1_conv2/kernel']
    assert names[-2:] == ['predictions/kernel', 'predictions/bias']


def test_digest_is_of_the_bytes_in_order():
    kernel = np.arange(2 * 3, dtype=np.float32).reshape(1, 1, 2, 3)
    bias = np.float32([7, 8, 9])
    params = {
        'block1_conv2': {'bias': bias, 'kernel': kernel},
        'block1_conv1': {'bias': bias * 2, 'kernel': np.asfortranarray(kernel)},
    }
    by_hand = hashlib.sha256(
        np.float32([0, 1, 2, 3, 4, 5, 14, 16, 18, 0, 1, 2, 3, 4, 5, 7, 8, 9]).tobytes()
    )
    assert digest(params) == by_hand.hexdigest()


def test_digest_sees_one_bit(imagenet):
    assert imagenet.digest == digest(imagenet.params) == IMAGENET.digest
    bias = imagenet.params['block3_conv2']['bias'].copy()
    bias.view(np.uint32)[5] ^= 1
    changed = imagenet.params | {'block3_conv2': imagenet.params['block3_conv2'] | {'bias': bias}}
    assert digest(changed) != IMAGENET.digest
