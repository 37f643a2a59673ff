import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from cnn_jax.nn.noise import random_bits


def test_they_are_the_first_words_that_jax_draws():
    """jax.extend.random's Threefry, of the counters (0, 0), (0, 1), …"""
    key = jax.random.key(7)
    count = 30
    counters = jnp.concatenate([jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)])
    expected = threefry_2x32(jax.random.key_data(key), counters)[:count]
    np.testing.assert_array_equal(random_bits(key, (2, 3, 5)).ravel(), expected)


def test_salmons_known_answer():
    """From the authors' test vectors (kat_vectors, threefry2x32, 20 rounds, all zero)."""
    key = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl='threefry2x32')
    assert random_bits(key, (1,)).item() == 0x6B200159


def test_every_bit_is_fair_and_keys_are_independent():
    a, b = (random_bits(jax.random.key(seed), (2**16,)) for seed in (0, 1))
    for words in (a, a ^ b):
        ones = np.unpackbits(np.asarray(words).view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
        assert np.all(abs(ones - 0.5) < 5 * 0.5 / 2**8)
