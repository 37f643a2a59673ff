"""How long the device stood idle because the next batch was not there."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Waiting:
    """Takes the batches of a run, and adds up the time in which they kept the device waiting.

    The time spent in `next` counts from where the device has nothing left to do: the results of
    the last step are ready. Where they are not when the batch is asked for, a thread looks when
    they become so, and the loop goes on unhindered. The thread can come late by some
    milliseconds when Python is busy: what is told is at most too little.

    Args:
        clock: Seconds.
        watch: Starts to watch some results; the future holds the clock when they are ready.

    Attributes:
        seconds: Waited so far.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        watch: 'Callable[[Any], Future[float]] | None' = None,
    ):
        self.seconds = 0.0
        self._clock = clock
        self._watch = watch or Watcher(clock)

    def next(self, batches: Iterator[Any], last: Any) -> Any:
        """The next batch.

        Args:
            batches: Where it comes from.
            last: An array that the last step computes, or None before the first.
        """
        watched = None if last is None or last.is_ready() else self._watch(last)
        began = self._clock()
        batch = next(batches)
        ended = self._clock()
        if watched is None:
            self.seconds += ended - began
        elif watched.done():  # else the device is busy still, or was until now
            self.seconds += max(0.0, ended - max(began, watched.result()))
        return batch


class Watcher:
    """Tells when arrays are ready, from a thread that ends with this object.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, 'waiting')  # started when it is first needed

    def __call__(self, array: Any) -> 'Future[float]':
        return self._thread.submit(_ready_at, array, self._clock)


def _ready_at(array: Any, clock: Callable[[], float]) -> float:
    jax.block_until_ready(array)
    return clock()
