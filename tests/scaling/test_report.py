import json

import pytest

from cnn_jax.scaling import report
from cnn_jax.scaling.chips import topology

MEMORY = {
    'arguments': 2_000_000_000,
    'results': 2_000_000_000,
    'place of arguments': 1_000_000_000,
    'temporaries': 500_000_000,
    'code': 1_000_000,
}
TEXT = """HloModule jit_train

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %r = f32[1000]{0:T(1024)} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%s
}
"""


@pytest.fixture
def found():
    return report.facts(TEXT, 1.97e11, 5e9, MEMORY, topology('v5e:2x4'), 128)


def test_memory_counts_shared_results_once(found):
    assert found['memory']['total'] == 3_501_000_000
    assert found['fits']
    big = MEMORY | {'temporaries': 14_000_000_000}
    assert not report.facts(TEXT, 1, 1, big, topology('v5e:2x4'), 1)['fits']


def test_times_follow_from_the_chip(found):
    time = found['estimate']
    assert time['compute'] == pytest.approx(1e-3)
    # The parameter is read and the sum written: 8 tiles and one of 1,024 numbers.
    assert time['hbm'] == pytest.approx(9 * 4096 / 819e9)
    assert time['step_serial'] == pytest.approx(1e-3 + time['ici'])


def test_weak_scaling_passes_through_what_was_compiled(found):
    rows = {row['chips']: row for row in found['estimate']['weak_scaling']}
    assert list(rows) == [4, 8, 16, 32, 64, 128, 256]
    assert rows[8]['step_serial'] == found['estimate']['step_serial']


def test_efficiency_is_against_the_program_of_one_chip_where_there_is_one():
    alone = report.facts(TEXT, 1.97e11, 1, MEMORY, topology('v5e:2x4'), 128, alone=5e-4)
    time = alone['estimate']
    assert time['efficiency_serial'] == pytest.approx(5e-4 / time['step_serial'])
    assert time['weak_scaling'][1]['efficiency_serial'] == time['efficiency_serial']
    (line,) = (x for x in report.lines(alone, topology('v5e:2x4').chip) if 'overlaps' in x)
    assert 'against one chip' in line


@pytest.mark.parametrize(
    ('old', 'new'), [('{{0,1,2,3,4,5,6,7}}', '{{0,1,2,3},{4,5,6,7}}'), ('all-reduce', 'all-gather')]
)
def test_a_layout_that_divides_more_than_batches_has_no_weak_scaling(old, new):
    text = TEXT.replace(old, new)
    facts = report.facts(text, 1, 1, MEMORY, topology('v5e:2x4'), 1)
    assert 'weak_scaling' not in facts['estimate']


def test_every_time_is_called_an_estimate_and_the_facts_are_json(found):
    lines = report.lines(json.loads(json.dumps(found)), topology('v5e:2x4').chip)
    assert all(line.split()[0] == 'estimate' for line in lines if ' ms' in line)
    assert any('1 all-reduce 4 kB' in line for line in lines)


def test_units_are_powers_of_ten():
    assert [report.size(n) for n in (3, 1_230, 4.56e6, 7e9)] == [
        '3 B',
        '1.23 kB',
        '4.56 MB',
        '7 GB',
    ]
