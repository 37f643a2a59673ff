"""The share of a run in which the device waited for data, on clocks that tests set."""

import json
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data.batches import DeviceBatches, StreamBatches
from cnn_jax.data.source import from_arrays
from cnn_jax.train import loop, setup, speed
from cnn_jax.train.meter import Meter
from cnn_jax.train.speed import Stopwatch
from cnn_jax.train.waiting import Waiting, Watcher


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def batches(self, *seconds):
        """Batches each of which takes its time."""
        for each in seconds:
            self.now += each
            yield each


class Results:
    """Of a step that ends at a time; also the future of that time."""

    def __init__(self, clock, at):
        self._clock, self._at = clock, at

    def is_ready(self):
        return self._at <= self._clock.now

    done = is_ready

    def result(self):
        assert self.is_ready()
        return self._at


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ('busy', 'wait'),
    [(None, 7.0), (0.0, 7.0), (3.0, 4.0), (7.0, 0.0), (9.0, 0.0)],
    ids=['before the first step', 'idle', 'busy at first', 'busy until then', 'busy longer'],
)
def test_what_counts_is_the_time_in_which_the_device_has_nothing_to_do(clock, busy, wait):
    waiting = Waiting(clock, watch=lambda results: results)
    last = None if busy is None else Results(clock, busy)
    assert waiting.next(clock.batches(7.0), last) == 7.0
    assert waiting.seconds == wait


@pytest.mark.parametrize(('read', 'share'), [(0.0, 0.0), (2.0, 0.0), (4.0, 0.25), (30.0, 0.9)])
def test_a_source_slower_than_the_steps_is_found(clock, read, share):
    """Steps of 3 s, begun when both their batch and the device are there."""
    waiting, last = Waiting(clock, watch=lambda results: results), Results(clock, 0.0)
    batches = clock.batches(*[read] * 50)
    waiting.next(batches, last)  # the first comes with compiling
    began, free = clock.now, clock.now
    waiting.seconds = 0.0
    for _ in range(49):
        free = max(free, clock.now) + 3.0
        waiting.next(batches, Results(clock, free))
        clock.now = max(clock.now, free - 3.0)  # the loop is at most a step ahead
    whole = clock.now - began
    assert waiting.seconds == pytest.approx(share * whole)


def test_a_watcher_tells_when_results_came(clock):
    ready = threading.Event()

    class Late:
        def block_until_ready(self):
            assert ready.wait(timeout=30)
            return self

    seen = Watcher(clock)(Late())
    assert not seen.done()
    clock.now = 5.0
    ready.set()
    assert seen.result(timeout=30) == 5.0


def test_a_watched_array_is_waited_for():
    waiting = Waiting()
    big: Any = jnp.ones((600, 600))
    for _ in range(5):
        big = big @ big / 600
        waiting.next(iter([1]), big)
    assert Watcher(lambda: 1.0)(big).result(timeout=30) == 1.0
    assert big.is_ready()
    assert waiting.seconds >= 0


def test_a_stopwatch_counts_the_waits_of_its_running_time(clock, monkeypatch):
    monkeypatch.setattr(speed.time, 'perf_counter', clock)
    waiting = Waiting(clock, watch=lambda results: results)
    watch, batches = Stopwatch(8, waiting), clock.batches(*[1.0] * 9)
    idle = {'objective': Results(clock, 0.0)}
    watch.next(batches, None)  # before the first step
    watch.start(1)
    watch.next(batches, idle)
    clock.now += 3.0  # the step
    watch.stop(2)
    watch.next(batches, idle)  # standing still
    watch.lap()
    assert (watch.share, watch.waited) == (0.25, [0.25])
    watch.start(3)
    watch.next(batches, idle)
    watch.drop()
    assert watch.lap() is None
    assert (watch.share, watch.waited) == (0.0, [0.25])


def test_images_on_the_device_are_not_waited_for(clock):
    assert (DeviceBatches.streams, StreamBatches.streams) == (False, True)
    watch = Stopwatch(8)
    assert watch.next(clock.batches(1.0), {'objective': Results(clock, 0.0)}) == 1.0
    watch.start(0)
    watch.stop(1)
    watch.lap()
    assert watch.waited == [0.0]


@pytest.fixture
def timed_fit(small, fit_again, tmp_path, monkeypatch, clock):
    """Trains with steps of 3 s and the given seconds for each batch, on a clock of the test's."""
    add = Meter.add

    def step(self, number, sums):
        sums['objective'].block_until_ready()  # the device has nothing to do when a batch is asked
        clock.now += 3.0
        add(self, number, sums)

    def make(seconds):
        monkeypatch.setattr(speed.time, 'perf_counter', clock)
        monkeypatch.setattr(loop, 'Waiting', lambda: Waiting(clock))
        monkeypatch.setattr(Meter, 'add', step)
        monkeypatch.setattr(DeviceBatches, 'streams', True)
        train = DeviceBatches.train

        def slow(self, start=0):
            for batch in train(self, start):
                clock.now += seconds
                yield batch

        monkeypatch.setattr(DeviceBatches, 'train', slow)
        outcome = fit_again(small(train__epochs=3.0, train__eval_every=1.0), count=40)
        lines = (tmp_path / 'run' / 'timing.jsonl').read_text().splitlines()
        return outcome, [json.loads(line)['waiting_share'] for line in lines]

    return make


@pytest.mark.parametrize(('seconds', 'share'), [(0.0, 0.0), (1.0, 0.25), (9.0, 0.75)])
def test_a_run_writes_down_how_long_it_waited(timed_fit, seconds, share, monkeypatch):
    outcome, written = timed_fit(seconds)
    assert written == outcome.waited[0]
    np.testing.assert_allclose(written, [share] * 3)
    monkeypatch.setattr(speed, 'calibrated_peak', lambda dtype: 2e11)
    facts = speed.measure(
        outcome.speeds, [1000], 'float32', speed.CompileClock(), waited=outcome.waited
    )
    assert facts['waiting_share'] == pytest.approx(share)
    line = speed.line(facts)
    assert ('config.data.memory_gb' in line) == (share > speed.WAITS)
    assert line.splitlines()[-1].startswith('speed: ')
    if share:
        assert line.startswith(f'the device waited for data {share:.0%} of the time: ')


@pytest.mark.parametrize(
    ('waited', 'share'), [([0.9], 0.9), ([0.9, 0.1], 0.1), ([0.9, 0.3, 0.1, 0.2], 0.2)]
)
def test_the_first_lap_does_not_count_where_there_are_others(waited, share, monkeypatch):
    monkeypatch.setattr(speed, 'calibrated_peak', lambda dtype: 2e11)
    laps = [[5.0] * len(waited), []]
    clock = speed.CompileClock()
    facts = speed.measure(laps, [1, 1], 'float32', clock, waited=[waited, []])
    assert facts['waiting_share'] == share
    assert 'waiting_share' not in speed.measure(laps, [1, 1], 'float32', clock)


def streamed(config, shape, count):
    """As the conftest's `opened`, from a source that streams."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, *shape), np.uint8)
    source = from_arrays('made up', images, draw.integers(0, 3, count), tuple('abc'))
    train, evaluation = (StreamBatches(source, batch=config.data.batch) for _ in range(2))
    description = setup.describe(config, train, evaluation)
    description['preprocessing'] = setup.preprocessing(config, train, None)
    task = setup.make_task(config, description)
    phases, _ = setup.open_phases(config, description, task, train, evaluation)
    return task, phases


def test_a_streamed_run_waits_for_a_share_of_its_time(small, fit):
    """In real time, of which nothing else is claimed."""
    (waited,) = fit(small(train__epochs=2.0), open=streamed).waited
    assert len(waited) == 2
    assert all(0 <= share <= 1 for share in waited)
