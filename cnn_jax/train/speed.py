"""How fast a run was, against what the machine can do; and what it cost in compiling and memory."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax.files import write_text
from cnn_jax.mesh import Layout
from cnn_jax.runtime import cores
from cnn_jax.summary import Layer
from cnn_jax.train.step import Steps
from cnn_jax.train.waiting import Waiting

COMPILING = tuple(
    f'/jax/core/compile/{name}_duration'
    for name in ('jaxpr_trace', 'jaxpr_to_mlir_module', 'backend_compile')
)
WAITS = 0.1  # the share of the time from which on waiting for data is spoken of


class Stopwatch:
    """Images a second of training alone: it stands still while anything else is done.

    Args:
        batch: Images a step.
        waiting: Takes the batches, where they may have to be waited for.

    Attributes:
        laps: Images a second of each lap that had a step.
        waited: The share of each of these in which the device waited for data.
        share: That of the last lap; 0 where no step was timed.
    """

    def __init__(self, batch: int, waiting: Waiting | None = None):
        self.laps: list[float] = []
        self.waited: list[float] = []
        self.share = 0.0
        self._waiting, self._wait, self._before = waiting, 0.0, 0.0
        self._batch, self._steps, self._seconds = batch, 0, 0.0
        self._mark: tuple[float, int] | None = None

    def next(self, batches: Iterator[Any], sums: dict[str, Any] | None) -> Any:
        """The next batch; `sums` are those of the last step, which may still be running."""
        if self._waiting is None:
            return next(batches)
        return self._waiting.next(batches, sums and sums['objective'])

    @property
    def running(self) -> bool:
        return self._mark is not None

    def start(self, step: int) -> None:
        """Go, after a step that has ended."""
        self._mark = time.perf_counter(), step
        self._before = self._waiting.seconds if self._waiting else 0.0

    def stop(self, step: int) -> None:
        """Stand still, after a step that has ended."""
        if self._mark:
            began, first = self._mark
            self._seconds += time.perf_counter() - began
            self._steps += step - first
            self._wait += self._waiting.seconds - self._before if self._waiting else 0.0
        self._mark = None

    def drop(self) -> None:
        """Forget the time since the start, and stand still."""
        self._mark = None

    def lap(self) -> float | None:
        """Images a second since the last lap; None where no step was timed."""
        steps, seconds, wait = self._steps, max(self._seconds, 1e-9), self._wait
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0
        self.share = min(wait / seconds, 1.0) if steps else 0.0
        if not steps:
            return None
        self.laps.append(steps * self._batch / seconds)
        self.waited.append(self.share)
        return self.laps[-1]


class CompileClock:
    """Measures what JAX spends on tracing, lowering and compiling from now on.

    Attributes:
        hits: Programs found in the persistent cache.
        misses: Programs compiled and put there; the quickest to compile are never kept.
    """

    def __init__(self):
        self.hits = self.misses = 0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in COMPILING:
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    def _event(self, event: str, **_: Any) -> None:
        self.hits += event == '/jax/compilation_cache/cache_hits'
        self.misses += event == '/jax/compilation_cache/cache_misses'

    @property
    def seconds(self) -> float:
        """Wall time so far: what is traced inside of another function counts once."""
        total, end = 0.0, 0.0
        for start, stop in sorted(self._spans):
            total += max(stop - max(start, end), 0.0)
            end = max(end, stop)
        return total


def training_flops(rows: Iterable[Layer], steps: Steps) -> int:
    """Multiplications and additions of a training step's matrix products, for one example.

    Σ f·(1 + [its kernel is trained] + [a layer before it is trained]), f those of a layer's
    forward pass: a kernel's gradient costs as much as the forward pass, and so does the gradient
    of the layer's input, which is needed only where something before it is trained. A net that
    is trained whole has 3·Σf less the first layer's f.

    Args:
        rows: Of `models.summary.layers`, in the order of their calls; padding counts, while bias,
            norm, activation, augmentation and optimizer do not.
        steps: Of the phase; on cached features the backbone computes nothing.
    """
    trainable, total, before = set(steps.trainable), 0, False
    for row in rows:
        if steps.cached and row.path.startswith('backbone/'):
            continue
        trained = f'{row.path}/kernel' in trainable
        total += row.flops * (1 + trained + before)
        before = before or any(name.startswith(f'{row.path}/') for name in trainable)
    return total


def calibrated_peak(dtype: str = 'float32', seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on the first device, the best of those in some seconds.

    Args:
        dtype: Of its elements, multiplied as JAX multiplies them by default.
        seconds: Time to spend, besides compiling.

    The matrices have 2048 rows on a CPU, and 8192 elsewhere, where smaller ones end too soon.
    """
    size = 2048 if jax.default_backend() == 'cpu' else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory() -> tuple[int, str]:
    """The most bytes ever held: of the device that held most, on a CPU of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    held = [each['peak_bytes_in_use'] for each in stats if 'peak_bytes_in_use' in each]
    if held and jax.default_backend() != 'cpu':
        return max(held), 'device'
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, 'process'


def units(layout: Layout | None) -> int:
    """How many times the peak of `calibrated_peak` a layout's devices have together.

    Of accelerators, each device has it. CPU devices of one process share that process's threads,
    and a product on one of them takes all: there each process has it.
    """
    if layout is None:
        return 1
    devices = layout.mesh.devices.flat
    if jax.default_backend() == 'cpu':
        return len({device.process_index for device in devices})
    return len(devices)


def measure(
    speeds: Sequence[Sequence[float]],
    flops: Sequence[int],
    dtype: str,
    clock: CompileClock,
    *,
    waited: Sequence[Sequence[float]] = (),
    layout: Layout | None = None,
) -> dict[str, Any]:
    """The facts about a run's speed; measures the machine, so call it after training.

    Args:
        speeds: Images a second of each phase's laps, as `loop.Outcome` has them. The run's is the
            median of the last phase that has any; where none has, only the cost is told.
        flops: Of `training_flops`, of each phase.
        dtype: Of the net's computation.
        clock: Running since the process began.
        waited: Shares of each phase's laps, as `loop.Outcome` has them; the run's is the median
            of the same phase, without its first lap, in which files are read for the first time,
            where there are others.
        layout: Of the run, on several devices.
    """
    memory, holder = peak_memory()
    facts: dict[str, Any] = {
        'compile_seconds': clock.seconds,
        'programs_from_cache': clock.hits,
        'programs_compiled': clock.misses,
        'peak_memory_bytes': memory,
        'peak_memory_of': holder,
    }
    timed = [number for number, laps in enumerate(speeds) if laps]
    if not timed:
        return facts
    laps, count = speeds[timed[-1]], flops[timed[-1]]
    shares = waited[timed[-1]] if waited else ()
    # A CPU computes products of bfloat16 in float32, which is what it can do at best.
    dtype = 'float32' if jax.default_backend() == 'cpu' else dtype
    images, peak = statistics.median(laps), calibrated_peak(dtype) * units(layout)
    if shares:
        facts['waiting_share'] = statistics.median(shares[1:] or shares)
    return {
        'images_per_second': images,
        'flops_per_image': count,
        'flops_per_second': images * count,
        'peak_flops_per_second': peak,
        'fraction_of_peak': images * count / peak,
        'peak_dtype': dtype,
    } | facts


def line(facts: dict[str, Any]) -> str:
    """The facts of `measure` in one line; one before it if the device waited for data."""
    cache = ''
    if facts['programs_from_cache'] and not facts['programs_compiled']:
        cache = ', all from the compile cache'
    cost = (
        f'compiling {facts["compile_seconds"]:.1f} s{cache} · '
        f'peak memory {facts["peak_memory_bytes"] / 1e9:.2f} GB ({facts["peak_memory_of"]})'
    )
    if 'images_per_second' not in facts:
        return f'speed: no step trained · {cost}'
    share = facts.get('waiting_share', 0.0)
    return (waits(share) + '\n') * (share > WAITS) + (
        f'speed: {facts["images_per_second"]:,.0f} images/s · '
        f'{facts["flops_per_second"] / 1e9:,.1f} GFLOP/s, {facts["fraction_of_peak"]:.0%} of the '
        f'{facts["peak_flops_per_second"] / 1e9:,.0f} of a {facts["peak_dtype"]} matrix product · '
        f'{cost}'
    )


def waits(share: float) -> str:
    """What to do about a share of the time in which the device waited for data."""
    return (
        f'the device waited for data {share:.0%} of the time: reading and decoding on '
        f'{cores()} core{"s" * (cores() > 1)} is slower than training. Give the process more '
        'cores, store the images at the size that the net takes, or set config.data.memory_gb '
        'above the size of the decoded images, which are then decoded once and stay on the device'
    )


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write `speed.json`, unless no step was trained and an earlier run's holds."""
    if 'images_per_second' in facts:
        write_text(folder / 'speed.json', json.dumps(facts, indent=2) + '\n')
