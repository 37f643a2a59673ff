"""Runs killed again and again end as if nobody had touched them."""

import random

import pytest

from tests.faults import runs


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return runs.tiny(runs.images(tmp_path_factory.mktemp('images')))


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
    """The end of a run that nobody disturbs; the first one compiled."""
    folder = tmp_path_factory.mktemp('undisturbed')
    runs.whole(config, folder / 'first')
    return runs.whole(config, folder / 'second')


@pytest.mark.parametrize(
    'kills',
    [
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(200, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(
    config, undisturbed, tmp_path, kills, record_property
):
    draw, done, count = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / f'run{count}'
        done += runs.survive(config, folder, draw, min(kills - done, 8), undisturbed.operations)
        assert runs.ended(folder).result() == undisturbed.result(), runs.log(folder)
        count += 1
    record_property('tried', done)
