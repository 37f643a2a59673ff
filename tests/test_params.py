"""Parameter paths and patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax import params
from cnn_jax.errors import UserError

TREE = {
    'backbone': {'conv1': {'kernel': jnp.ones((3, 3, 1, 4)), 'bias': jnp.full(4, 2.0)}},
    'head': {'logits': {'kernel': jnp.full((4, 2), 3.0), 'bias': jnp.full(2, 4.0)}},
}
PATHS = ['backbone/conv1/bias', 'backbone/conv1/kernel', 'head/logits/bias', 'head/logits/kernel']


def test_flatten_and_unflatten_are_inverse():
    flat = params.flatten(TREE)
    assert list(flat) == PATHS
    jax.tree.map(np.testing.assert_array_equal, params.unflatten(flat), TREE)


def test_a_slash_within_a_name_is_kept():
    tree = {'WeightNorm_0': {'Dense_0/kernel/scale': jnp.ones(3)}, 'Dense_0': {'bias': jnp.ones(3)}}
    assert list(params.flatten(tree)) == params.paths_of(tree)
    assert len(params.paths_of(tree)[1].split('/')) == 2
    assert jax.tree.structure(params.unflatten(params.flatten(tree))) == jax.tree.structure(tree)


@pytest.mark.parametrize(
    ('patterns', 'expected'),
    [
        (('backbone/*',), PATHS[:2]),
        (('*/kernel',), [PATHS[1], PATHS[3]]),
        (('*conv*/kernel',), [PATHS[1]]),
        ((), []),
    ],
)
def test_select(patterns, expected):
    assert params.select(PATHS, patterns, field='train.frozen') == expected


def test_a_pattern_that_matches_nothing_is_an_error_naming_it_and_the_parameters():
    with pytest.raises(UserError, match=r"train.frozen has the pattern 'backbon/\*'.*head/logits"):
        params.select(PATHS, ('backbon/*',), field='train.frozen')


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match='nothing is left to train'):
        params.trainable(PATHS, ('*',))


@given(st.sets(st.sampled_from(PATHS)))
def test_partition_and_merge_lose_nothing(names):
    inside, outside = params.partition(TREE, names)
    assert set(inside) == names
    jax.tree.map(np.testing.assert_array_equal, params.merge(inside, outside), TREE)


def test_depth_counts_blocks_from_the_head():
    paths = ['stem_conv/kernel', 'block1_conv1/kernel', 'block2_norm1/scale', 'head/logits/bias']
    assert list(params.depths(paths).values()) == [3, 2, 1, 0]
    assert params.depths(PATHS)['backbone/conv1/kernel'] == 1
