"""How fast a run was, against what the machine can do; and what it cost in compiling and memory."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax.models.summary import Layer
from cnn_jax.train.step import Steps
from cnn_jax.train.workdir import write_text

COMPILING = tuple(
    f'/jax/core/compile/{name}_duration'
    for name in ('jaxpr_trace', 'jaxpr_to_mlir_module', 'backend_compile')
)


class Stopwatch:
    """Images a second of training alone: it stands still while anything else is done.

    Args:
        batch: Images a step.

    Attributes:
        laps: Images a second of each lap that had a step.
    """

    def __init__(self, batch: int):
        self.laps: list[float] = []
        self._batch, self._steps, self._seconds = batch, 0, 0.0
        self._mark: tuple[float, int] | None = None

    @property
    def running(self) -> bool:
        return self._mark is not None

    def start(self, step: int) -> None:
        """Go, after a step that has ended."""
        self._mark = time.perf_counter(), step

    def stop(self, step: int) -> None:
        """Stand still, after a step that has ended."""
        if self._mark:
            began, first = self._mark
            self._seconds += time.perf_counter() - began
            self._steps += step - first
        self._mark = None

    def drop(self) -> None:
        """Forget the time since the start, and stand still."""
        self._mark = None

    def lap(self) -> float | None:
        """Images a second since the last lap; None where no step was timed."""
        steps, seconds = self._steps, self._seconds
        self._steps, self._seconds = 0, 0.0
        if not steps:
            return None
        self.laps.append(steps * self._batch / max(seconds, 1e-9))
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


def measure(
    speeds: Sequence[Sequence[float]], flops: Sequence[int], dtype: str, clock: CompileClock
) -> dict[str, Any]:
    """The facts about a run's speed; measures the machine, so call it after training.

    Args:
        speeds: Images a second of each phase's laps, as `loop.Outcome` has them. The run's is the
            median of the last phase that has any; where none has, only the cost is told.
        flops: Of `training_flops`, of each phase.
        dtype: Of the net's computation.
        clock: Running since the process began.
    """
    memory, holder = peak_memory()
    facts: dict[str, Any] = {
        'compile_seconds': clock.seconds,
        'programs_from_cache': clock.hits,
        'programs_compiled': clock.misses,
        'peak_memory_bytes': memory,
        'peak_memory_of': holder,
    }
    timed = [(laps, count) for laps, count in zip(speeds, flops, strict=True) if laps]
    if not timed:
        return facts
    laps, count = timed[-1]
    # A CPU computes products of bfloat16 in float32, which is what it can do at best.
    dtype = 'float32' if jax.default_backend() == 'cpu' else dtype
    images, peak = statistics.median(laps), calibrated_peak(dtype)
    return {
        'images_per_second': images,
        'flops_per_image': count,
        'flops_per_second': images * count,
        'peak_flops_per_second': peak,
        'fraction_of_peak': images * count / peak,
        'peak_dtype': dtype,
    } | facts


def line(facts: dict[str, Any]) -> str:
    """The facts of `measure` in one line."""
    cache = ''
    if facts['programs_from_cache'] and not facts['programs_compiled']:
        cache = ', all from the compile cache'
    cost = (
        f'compiling {facts["compile_seconds"]:.1f} s{cache} · '
        f'peak memory {facts["peak_memory_bytes"] / 1e9:.2f} GB ({facts["peak_memory_of"]})'
    )
    if 'images_per_second' not in facts:
        return f'speed: no step trained · {cost}'
    return (
        f'speed: {facts["images_per_second"]:,.0f} images/s · '
        f'{facts["flops_per_second"] / 1e9:,.1f} GFLOP/s, {facts["fraction_of_peak"]:.0%} of the '
        f'{facts["peak_flops_per_second"] / 1e9:,.0f} of a {facts["peak_dtype"]} matrix product · '
        f'{cost}'
    )


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write `speed.json`, unless no step was trained and an earlier run's holds."""
    if 'images_per_second' in facts:
        write_text(folder / 'speed.json', json.dumps(facts, indent=2) + '\n')
