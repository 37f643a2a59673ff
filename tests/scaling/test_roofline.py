import pytest

from cnn_jax.scaling.chips import HOP, Chip, Topology
from cnn_jax.scaling.hlo import Collective
from cnn_jax.scaling.roofline import Estimate, communication, estimate, scaled

# 100 FLOP/s, 10 bytes/s of memory, 5 bytes/s a link; sides of four close to a ring.
CHIP = Chip('toy', 'Toy', 100.0, 1000.0, 10.0, 5.0, 4, 4)


def slice_of(*sides):
    return Topology(CHIP, sides)


def test_a_chip_is_bound_by_the_slower_of_arithmetic_and_memory():
    by_memory = estimate(200, 50, [], slice_of(1, 1))
    assert (by_memory.compute, by_memory.memory, by_memory.chip) == (2.0, 5.0, 5.0)
    assert by_memory.bound == 'HBM'
    assert estimate(1000, 50, [], slice_of(1, 1)).bound == 'compute'


@pytest.mark.parametrize(
    ('kind', 'seconds'),
    [
        # A line of two chips, 40 bytes: one half crosses a link of 5 bytes/s, in 4 s.
        ('all-gather', 4 + HOP),
        ('reduce-scatter', 4 + HOP),
        ('all-reduce', 2 * (4 + HOP)),
        ('all-to-all', (4 + HOP) / 2),
        ('collective-permute', 8 + HOP),
    ],
)
def test_each_kind_on_two_chips(kind, seconds):
    assert communication(Collective(kind, 40, 2), slice_of(1, 2)) == pytest.approx(seconds)


def test_a_ring_uses_both_directions():
    # 3/4 of 40 bytes at 10 bytes/s, three hops.
    gather = Collective('all-gather', 40, 4)
    assert communication(gather, slice_of(1, 4)) == pytest.approx(3 + 3 * HOP)


def test_the_second_side_moves_what_the_first_has_left():
    # Side 2, a line: half of 40 bytes at 5; then side 4, a ring: 3/4 of 20 bytes at 10.
    gather = Collective('all-gather', 40, 8)
    assert communication(gather, slice_of(2, 4)) == pytest.approx(4 + 1.5 + 4 * HOP)


def test_a_group_that_is_a_part_of_the_slice_is_a_line():
    gather = Collective('all-gather', 40, 4)
    assert communication(gather, slice_of(4, 4)) == pytest.approx(6 + 3 * HOP)


def test_alone_there_is_nothing_to_say():
    assert communication(Collective('all-reduce', 40, 1), slice_of(1, 1)) == 0


def test_large_arrays_cost_the_same_on_any_line_up_to_a_factor_of_two():
    times = [communication(Collective('all-reduce', 10**9, n), slice_of(1, n)) for n in (2, 3, 6)]
    assert times == sorted(times)
    assert times[-1] < 2 * times[0]


def test_overlap_bounds_the_step():
    time = Estimate(compute=3.0, memory=4.0, ici=1.0)
    assert (time.overlapped, time.serial) == (4.0, 5.0)
    assert time.efficiency() == (0.8, 1.0)
    assert time.efficiency(alone=2.0) == (0.4, 0.5)
    slow = Estimate(compute=3.0, memory=4.0, ici=8.0)
    assert (slow.overlapped, slow.serial) == (8.0, 12.0)
    assert slow.efficiency() == (pytest.approx(1 / 3), 0.5)
    assert (time.bound, slow.bound) == ('HBM', 'ICI')


def test_at_the_hiding_batch_communication_takes_as_long_as_arithmetic():
    # Twice as long at 16 examples: equal at 32.
    assert Estimate(4.0, 5.0, 8.0).hiding_batch(16) == 32
    assert Estimate(3.0, 5.0, 1.0).hiding_batch(1) == 1  # rounded up
    assert Estimate(3.0, 5.0, 0.0).hiding_batch(7) == 0


def test_scaling_keeps_the_groups_that_are_parts():
    found = [Collective('all-reduce', 8, 8), Collective('all-gather', 8, 2)]
    assert scaled(found, slice_of(2, 4), slice_of(16, 16)) == [
        Collective('all-reduce', 8, 256),
        Collective('all-gather', 8, 2),
    ]
    assert scaled(found[:1], slice_of(2, 4), slice_of(2, 4)) == found[:1]
