"""Names from outside do nothing where they are told."""

import csv
import doctest
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax import errors
from cnn_jax.errors import csv_cell, printable

DIRECTIONS = {'LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI'}
SHOWN = {
    'a\x1b]0;title\x07.png': r'a\x1b]0;title\x07.png',
    'two\nlines\r': r'two\nlines\r',
    'c1\x9b31m': r'c1\x9b31m',
    'gnp.\u202ecod': r'gnp.\u202ecod',
    'isolate\u2066': r'isolate\u2066',
    'line\u2028': r'line\u2028',
    'bytes \udcff': r'bytes \udcff',
    'tag \U000e0041': r'tag \U000e0041',
}
ORDINARY = [
    '日本 ü',
    'ملف',
    '👩\u200d🔬',
    'Screenshot\u202f1.00\xa0PM',
    'e\u0301',
    "a 'b' \\ $x_1$ <b>",
]


@pytest.mark.parametrize('name', SHOWN)
def test_what_would_act_is_shown(name):
    assert printable(name) == SHOWN[name]


@pytest.mark.parametrize('name', ORDINARY)
def test_ordinary_names_stay_as_they_are(name):
    assert printable(name) == name


@given(st.text(st.characters(codec=None)))
def test_nothing_that_acts_is_left(text):
    shown = printable(text)
    assert printable(shown) == shown
    for character in shown:
        assert unicodedata.category(character) not in ('Cc', 'Cs', 'Zl', 'Zp')
        assert unicodedata.bidirectional(character) not in DIRECTIONS
    assert printable('a\n\tb\x1b', keep='\n\t') == 'a\n\tb\\x1b'


@given(
    st.text(st.characters(codec=None)) | st.sampled_from(['=1', '+1', '-1', '@x', '\t=1', '＝1'])
)
def test_no_cell_is_a_formula(text):
    file = io.StringIO()
    csv.writer(file, lineterminator='\n').writerow([csv_cell(text), 'end'])
    assert file.getvalue().count('\n') == 1
    [[cell, end]] = csv.reader([file.getvalue()])
    assert not cell.startswith(('=', '+', '-', '@', '＝', '＋', '－', '＠'))
    assert end == 'end'
    assert csv_cell(-0.5) == -0.5


def test_the_examples_are_true():
    assert doctest.testmod(errors).failed == 0
