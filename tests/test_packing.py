"""Packed arrays are the arrays themselves, on every platform; a sum over joined ones is theirs."""

import jax
import numpy as np
import pytest

from cnn_jax.mesh import LARGE
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.packing import joined, packed

SHAPES = [(), (3,), (2, 3, 4), (3,), (LARGE,), (2, LARGE // 2 - 1)]


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('count', [0, 1, 2, len(SHAPES)])
def test_arrays_keep_their_bits_and_their_sum(platform, count):
    rng = np.random.default_rng(0)
    flat = {str(i): rng.normal(size=s).astype(np.float32) for i, s in enumerate(SHAPES[:count])}
    with compiling_for(platform):
        # Anew for each platform: what is jitted is traced once.
        found, parts = jax.jit(lambda flat: (packed(flat), joined([*flat.values()])))(flat)
    assert found.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(found[name], array)
    before, after = (np.concatenate([[], *map(np.ravel, each)]) for each in (flat.values(), parts))
    np.testing.assert_array_equal(np.sort(before), np.sort(after))
    if platform == 'gpu' and count == len(SHAPES):
        assert [part.size for part in parts] == [1 + 3 + 24 + 3 + LARGE - 2, LARGE]
