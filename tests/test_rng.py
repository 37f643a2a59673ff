"""Keys follow from (seed, stream, step) alone."""

import itertools

import jax
import numpy as np

from cnn_jax import rng


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)))


def test_every_seed_stream_and_step_has_its_own_key():
    grid = itertools.product((0, 1, 2**32 - 1), rng.STREAMS, (0, 1, 1000))
    keys = [bits(rng.key(*place)) for place in grid]
    assert len(set(keys)) == len(keys)


def test_a_key_can_be_made_inside_a_compiled_step():
    traced = jax.jit(lambda seed, step: rng.key(seed, 'dropout', step))(np.uint32(7), 3)
    assert bits(traced) == bits(rng.key(7, 'dropout', 3))


def test_known_bits():
    # Committed numbers: a change here changes the result of every run ever made.
    assert bits(rng.key(0, 'params')) == (4165894930, 804218099)
    assert bits(rng.key(1, 'dropout', 5)) == (228184135, 3585791567)
