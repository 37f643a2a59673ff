"""Being asked to stop: the first signal is noted, the second one is not held back."""

import signal

import pytest

from cnn_jax.train.interruption import Interruption

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def arrived():
    """The signals that reached the handlers that were there before."""
    found = []
    before = {n: signal.signal(n, lambda number, _: found.append(number)) for n in SIGNALS}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('second', SIGNALS)
@pytest.mark.parametrize('first', SIGNALS)
def test_a_second_signal_stops_at_once(arrived, first, second):
    with Interruption() as interruption:
        assert not interruption.stops_after(1)
        signal.raise_signal(first)
        assert interruption.stops_after(2)
        assert not arrived
        signal.raise_signal(second)
        assert arrived == [second]


def test_afterwards_signals_go_where_they_went_before(arrived):
    with Interruption():
        pass
    signal.raise_signal(signal.SIGTERM)
    assert arrived == [signal.SIGTERM]
