"""The bar degrades to lines, and the first signal is noted while the second is not held back."""

import signal
import sys
from types import SimpleNamespace

import pytest

from cnn_jax.tools.progress import Interruption, Progress, in_notebook

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def shown(progress, steps=3):
    with progress:
        for step in range(1, steps + 1):
            progress.step(step, 0.5, 0.25)
            progress.say(f'line {step}')


def test_in_a_pipe_there_are_lines_alone(capsys):
    shown(Progress(3, 0, 8, 1.0))
    assert capsys.readouterr().out == 'line 1\nline 2\nline 3\n'


def test_a_live_bar_shows_epoch_loss_and_accuracy(capsys):
    shown(Progress(3, 0, 8, 1.0, live=True))
    printed = capsys.readouterr().out
    for text in ('line 2\n', 'epoch 3.0/3', 'loss 0.5000', 'accuracy 0.2500', 'images/s'):
        assert text in printed


class ZMQInteractiveShell:
    """Jupyter's shell has this name."""


def test_in_a_notebook_there_is_a_bar(capsys, monkeypatch):
    python = SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, 'IPython', python)
    assert in_notebook()
    shown(Progress(3, 0, 8, 1.0))
    printed = capsys.readouterr().out
    assert 'line 2\n' in printed
    assert 'epoch 3.0/3' in printed.split('\r')[-1]


@pytest.fixture
def arrived():
    """The signals that reached the handlers that were there before."""
    seen = []
    before = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in SIGNALS}
    yield seen
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
