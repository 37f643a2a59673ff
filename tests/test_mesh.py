"""Which device holds what."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from cnn_jax.errors import UserError
from cnn_jax.mesh import LARGE, Layout, make_mesh


@dataclass(frozen=True)
class Device:
    """What a mesh wants to know of a device."""

    process_index: int
    id: int


def devices(*hosts):
    """Of so many on each host, in no order."""
    found = []
    for process, count in enumerate(hosts):
        found += [Device(process, len(found) + k) for k in range(count)]
    return list(np.random.default_rng(0).permutation(np.array(found, object)))


def specs(layout, *shapes):
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return [layout._spec(leaf.shape) for leaf in tree]


def test_each_process_has_one_piece_of_every_batch():
    grid = make_mesh(devices(2, 2, 2), [12], model=2).mesh.devices
    assert grid.shape == (3, 2)
    assert [[device.process_index for device in row] for row in grid] == [[0, 0], [1, 1], [2, 2]]
    ids = [device.id for device in grid.ravel()]
    assert ids == sorted(ids)


@given(st.integers(1, 16), st.lists(st.integers(1, 400), min_size=1, max_size=3))
def test_one_process_uses_the_most_devices_that_divide_all_batches(count, batches):
    used = make_mesh(devices(count), batches).mesh.shape['data']
    fitting = [n for n in range(1, count + 1) if all(batch % n == 0 for batch in batches)]
    assert used == max(fitting)


@pytest.mark.parametrize('batches', [[12, 8], [7]])
def test_several_processes_must_divide_the_batches(batches):
    with pytest.raises(UserError, match='multiples of 6'):
        make_mesh(devices(3, 3), batches)


@pytest.mark.parametrize(('hosts', 'model'), [((8,), 3), ((2, 2), 4), ((1, 1), 2)])
def test_a_matrix_is_shared_within_a_process(hosts, model):
    with pytest.raises(UserError, match='choose a divisor'):
        make_mesh(devices(*hosts), [16], model=model)


def test_small_arrays_are_everywhere():
    layout = make_mesh(devices(8), [16], model=2, fsdp=True)
    assert specs(layout, (), (7,), (LARGE // 8 - 1, 8)) == [PartitionSpec()] * 3


def test_large_matrices_are_divided_by_their_columns():
    layout = make_mesh(devices(8), [16], model=2)
    wide, odd, kernel = specs(layout, (25088, 1024), (25088, 1023), (3, 3, 512, 512))
    assert wide == PartitionSpec(None, 'model')
    assert odd == PartitionSpec(None, None)
    assert kernel == PartitionSpec(None, None, None, None)


def test_fsdp_divides_large_arrays_by_their_longest_axis_that_can_be():
    layout = make_mesh(devices(8), [16], fsdp=True)
    wide, odd, kernel = specs(layout, (25088, 1024), (25087, 1024), (3, 3, 256, 512))
    assert wide == PartitionSpec('data', None)
    assert odd == PartitionSpec(None, 'data')
    assert kernel == PartitionSpec(None, None, None, 'data')


@given(
    st.lists(st.sampled_from([1, 3, 8, 30, 512, 4096]), min_size=1, max_size=4),
    st.sampled_from([(1, False), (1, True), (2, False), (2, True), (4, True)]),
)
def test_what_is_divided_divides_evenly(shape, options):
    model, fsdp = options
    layout = make_mesh(devices(8), [16], model=model, fsdp=fsdp)
    (spec,) = specs(layout, tuple(shape))
    parts = [layout.mesh.shape[axis] for axis in spec if axis]
    assert all(size % layout.mesh.shape[axis] == 0 for size, axis in zip(shape, spec) if axis)
    assert math.prod(parts) in (1, layout.mesh.size, *layout.mesh.shape.values())


def test_a_placed_state_is_the_state():
    layout = make_mesh(jax.devices()[:1], [4], fsdp=True)
    tree = {'a': np.arange(6.0).reshape(2, 3), 'b': jnp.float32(2)}
    placed = layout.shard(tree)
    assert isinstance(layout, Layout)
    assert str(layout) == 'one device, sharded parameters'
    np.testing.assert_array_equal(placed['a'], tree['a'])
    assert placed['b'] == 2
