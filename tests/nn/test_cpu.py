"""Sums as a CPU takes them, and as others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.nn.cpu import compiling_for, sum_pair

PAIRS = [((4, 3), (0,)), ((2, 5, 7, 3), (0, 1, 2)), ((2, 5, 7, 3), (1, 2)), ((2, 5, 7, 3), (0, 3))]


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize(('shape', 'axes'), PAIRS)
def test_paired_sums_agree_with_float64_on_every_platform(platform, shape, axes):
    u, v = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in (0, 1))
    with compiling_for(platform):
        sums = sum_pair(jnp.array(u), jnp.array(v), axes)
    for found, array in zip(sums, (u, v)):
        expected = array.astype(np.float64).sum(axis=axes)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def operations(platform):
    """How many arrays each reduction of a pair of sums takes."""
    x = jnp.ones((2, 5, 7, 3))
    with compiling_for(platform):
        equations = jax.make_jaxpr(lambda x: sum_pair(x, x * x, (0, 1, 2)))(x).jaxpr.eqns
    return [len(e.outvars) for e in equations if 'reduce' in e.primitive.name]


def test_the_pair_is_read_together_on_a_cpu_and_is_plain_sums_elsewhere():
    # XLA adds sums up among devices, but gathers the parts of a reduction of two arrays.
    assert operations('cpu') == [2, 2]
    assert operations('tpu') == [1, 1]
    assert operations('gpu') == [1, 1]
