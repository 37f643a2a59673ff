"""The example in one file runs, and its claim is one of a mean with an interval."""

import subprocess
import sys

import pytest

from tests.environments import ROOT


@pytest.fixture(scope='module')
def printed():
    """The lines that minimal.py prints for two pairs of one epoch."""
    command = [sys.executable, 'minimal.py', '--pairs=2', '--epochs=1']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize('measure', ['accuracy', 'loss'])
def test_it_prints_a_difference_and_its_interval(measure, printed):
    [line] = [line for line in printed if line.startswith(f'{measure}: ')]
    assert '95% interval' in line
    assert '2 pairs' in line


def test_both_arms_of_a_pair_are_printed(printed):
    assert [line.startswith('seed') for line in printed].count(True) == 2


def test_it_fits_on_three_screens():
    assert len((ROOT / 'minimal.py').read_text().splitlines()) <= 150
