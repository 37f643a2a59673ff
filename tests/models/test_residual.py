"""The residual variant of the strided net: its shortcut, its branches, and who is skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cnn_jax.config import Model
from cnn_jax.models import StridedNet

PLAIN = Model(stem_width=0, widths=(4, 6), hidden=(8,), dropout=0.0, head_dropout=0.0)
RESIDUAL = dataclasses.replace(PLAIN, residual=True)
X = jax.random.normal(jax.random.key(1), (16, 9, 10, 3))


def init(config):
    return StridedNet(config, 5).init(jax.random.key(0), X[:1], train=False)


def outputs(config, variables, seed=0):
    """The training output, and what each layer returned."""
    logits, state = StridedNet(config, 5).apply(
        variables,
        X,
        train=True,
        rngs={'dropout': jax.random.key(seed)},
        mutable=['batch_stats', 'intermediates'],
        capture_intermediates=True,
    )
    layers = flatten_dict(state['intermediates'], sep='/')
    return logits, {path.removesuffix('/__call__'): y for path, (y,) in layers.items()}


@pytest.mark.parametrize('padding', ['SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT'])
@pytest.mark.parametrize(
    'change', [{}, {'downsample': 'max_pool'}, {'weight_standardization': True}], ids=str
)
def test_a_pair_returns_its_branch_plus_a_strided_projection(padding, change):
    """Shortcuts are not standardized: of a grey image their filters' one weight would be 0."""
    config = dataclasses.replace(RESIDUAL, padding=padding, **change)
    _, layers = outputs(config, init(config))
    kernel = init(config)['params']['block1_shortcut_conv']['kernel']
    assert kernel.shape == (1, 1, 3, 4)
    shortcut = jnp.einsum('bijc,cf->bijf', X[:, ::2, ::2], kernel[0, 0])
    np.testing.assert_allclose(layers['block1_shortcut_conv'], shortcut, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        layers['block1_drop'], layers['block1_depth'] + shortcut, rtol=1e-4, atol=1e-5
    )


def test_the_layers_it_shares_with_the_plain_net_start_alike():
    plain, residual = (flatten_dict(init(c)['params'], sep='/') for c in (PLAIN, RESIDUAL))
    assert set(residual) - set(plain) == {
        f'block{i}_shortcut_conv/{leaf}' for i in (1, 2) for leaf in ('kernel', 'bias')
    }
    for path, leaf in plain.items():
        np.testing.assert_array_equal(residual[path], leaf)


def test_depth_skips_branches_of_whole_examples_the_last_at_the_full_rate():
    config, variables = dataclasses.replace(RESIDUAL, stochastic_depth=1.0), init(RESIDUAL)
    _, layers = outputs(config, variables)
    skipped = np.asarray(layers['block1_depth'] == 0).reshape(len(X), -1)
    assert set(skipped.mean(axis=1)) == {0.0, 1.0}
    np.testing.assert_array_equal(layers['block2_depth'], np.zeros_like(layers['block2_depth']))
    np.testing.assert_array_equal(layers['block2_drop'], layers['block2_shortcut_conv'])


def test_rate_0_is_the_net_without_and_inference_knows_no_rate():
    variables = init(RESIDUAL)
    net = StridedNet(dataclasses.replace(RESIDUAL, stochastic_depth=0.5), 5)
    plain = StridedNet(RESIDUAL, 5)
    np.testing.assert_array_equal(
        net.apply(variables, X, train=False), plain.apply(variables, X, train=False)
    )
    _, layers = outputs(RESIDUAL, variables)
    np.testing.assert_array_equal(layers['block1_depth'], layers['block1_norm2'])


def test_no_noise_shifts_the_mask_of_another_layer():
    """Who is dropped in the head does not depend on what was drawn before it."""
    base = dataclasses.replace(RESIDUAL, head_dropout=0.5)
    changes = [
        {},
        {'residual': False},
        {'input_noise': 0.5},
        {'stochastic_depth': 0.5},
        {'dropout': 0.5, 'drop_kind': 'channel'},
        {'dropout': 0.5, 'drop_kind': 'block', 'drop_block': 2},
        {'dropout': 0.5, 'drop_kind': 'gaussian'},
        {'norm': 'group', 'norm_groups': 2},
    ]
    masks = []
    for change in changes:
        config = dataclasses.replace(base, **change)
        masks.append(np.asarray(outputs(config, init(config))[1]['head/drop1'] == 0))
    assert 0.3 < masks[0].mean() < 0.7
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])
