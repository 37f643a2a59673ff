import math

import pytest

from cnn_jax.errors import UserError
from cnn_jax.scaling.chips import CHIPS, topology


@pytest.mark.parametrize('name', ['v5e:1x1', 'v5e:2x4', 'v5e:16x16', 'v6e:2x4', 'v5p:2x2x1'])
def test_names_are_read_and_written_alike(name):
    assert str(topology(name)) == name


def test_the_sides_are_the_numbers_of_chips():
    assert math.prod(topology(' v6e:4x8').sides) == 32


@pytest.mark.parametrize('name', ['', 'v5e', 'v5e:', 'v5e:8', 'v5e:2x', 'v5e:0x2', 'v5e:2x2x2'])
def test_other_names_are_mistakes_with_an_example(name):
    with pytest.raises(UserError, match=r'v5e:2x4'):
        topology(name)


def test_an_unknown_chip_is_a_mistake_that_names_the_known_ones():
    with pytest.raises(UserError, match=', '.join(CHIPS)):
        topology('h100:2x4')


def test_only_whole_sides_of_a_pod_close():
    assert [topology('v5e:8x16').chip.closes(side) for side in (8, 16)] == [False, True]
    assert topology('v5p:4x4x4').chip.closes(4)


@pytest.mark.parametrize('chip', CHIPS.values(), ids=lambda chip: chip.name)
def test_units_are_plausible(chip):
    # More arithmetic than memory and more memory than links move: a slip of 1000 would show.
    assert 100 < chip.peak / chip.bandwidth < 1000
    assert 2 < chip.bandwidth / (chip.link * chip.links) < 20
    assert 8e9 < chip.memory < 200e9
