"""The summary against the compiler's count and against counts by hand."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from cnn_jax.config import Model
from cnn_jax.models import StridedNet
from cnn_jax.summary import layers, summary

NET = StridedNet(Model(), 10)
SHAPE = (96, 96, 3)


def test_one_row_a_layer_in_the_order_of_the_calls_with_counts_by_hand():
    rows = {row.path: row for row in layers(NET, SHAPE)}
    assert list(rows)[:3] == ['stem_conv', 'block1_conv1', 'block1_norm1']
    assert list(rows)[-4:] == ['head/dense1', 'head/norm1', 'head/drop1', 'head/logits']
    assert len(rows) == 1 + 3 * 5 + 4
    stem, dense = rows['stem_conv'], rows['head/dense1']
    assert (stem.kind, stem.output, stem.parameters) == ('Conv', (45, 45, 16), 7 * 7 * 3 * 16 + 16)
    assert stem.flops == 2 * 45 * 45 * 7 * 7 * 3 * 16
    assert (dense.output, dense.parameters) == ((512,), 4608 * 512 + 512)
    assert dense.flops == 2 * 4608 * 512
    assert rows['block1_drop'].parameters == rows['block1_drop'].flops == 0


@pytest.mark.usefixtures('xla_convolutions')
def test_totals_agree_with_the_compiler_and_the_parameter_tree():
    """XLA also counts bias, norm and activation, but leaves out products with padding."""
    net = StridedNet(Model(padding='VALID'), 10)
    x = jax.ShapeDtypeStruct((1, *SHAPE), np.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda key, x: net.init(key, x, train=False), key, x)
    forward = jax.jit(lambda variables, x: net.apply(variables, x, train=False))
    counted = forward.lower(variables, x).cost_analysis()['flops']
    rows = layers(net, SHAPE)
    flops = sum(row.flops for row in rows)
    assert flops < counted < 1.02 * flops
    leaves = jax.tree.leaves(variables['params'])
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize('shape', [SHAPE, (7, 7, 1), (32, 48, 3)])
def test_the_text_of_any_input_shape_fits_100_columns_and_ends_in_the_totals(shape):
    lines, rows = summary(NET, shape).splitlines(), layers(NET, shape)
    assert max(map(len, lines)) <= 100
    assert f'{sum(row.parameters for row in rows):,} parameters' in lines[-1]


class Two(nn.Module):
    """A layer with two outputs."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x), x


class Skipping(nn.Module):
    """A net whose layers pass on more than an array."""

    @nn.compact
    def __call__(self, x, train=False):
        y, x = Two()(x.reshape(len(x), -1))
        _, y = nn.OptimizedLSTMCell(3)((y[:, :3], y[:, :3]), x)
        return y


class Attending(nn.Module):
    """A net that calls a layer twice and has a parameter beside its layers."""

    @nn.compact
    def __call__(self, x, train=False):
        dense = nn.Dense(16)
        x = dense(dense(x.reshape(len(x), -1, 16) + self.param('at', nn.initializers.zeros, (16,))))
        return nn.MultiHeadDotProductAttention(4)(x)


def test_totals_of_other_nets_are_of_all_parameters_and_all_calls():
    rows = layers(Attending(), (4, 4, 4))  # 4 positions of 16 numbers
    variables = jax.eval_shape(Attending().init, jax.random.key(0), np.zeros((1, 4, 4, 4)))
    leaves = jax.tree.leaves(variables['params'])
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in leaves)
    assert sum(row.flops for row in rows) == 6 * 2 * 4 * 16 * 16
    assert len(summary(Attending(), (4, 4, 4)).splitlines()) == len(rows) + 2


def test_layers_may_return_more_than_an_array():
    rows = {row.path: row for row in layers(Skipping(), (2, 2, 1))}
    assert rows['Two_0/Dense_0'].output == (4,)
    assert sum(row.parameters for row in rows.values()) >= 4 * 4 + 4
