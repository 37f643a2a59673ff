"""Speed: images a second, input stalls, share of the machine's peak, time spent compiling, and a
profile of some steps by layer.
"""

import collections
import contextlib
import itertools
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax.files import write_text
from cnn_jax.mesh import Layout
from cnn_jax.runtime import cores, count
from cnn_jax.summary import Layer

STEPS, WARM = 5, 2  # profiled, and trained before, which compiles
ROWS = 15  # of the table
STALLED = 0.1  # fraction of stalled time from which on advice is printed
COMPILING = '/jax/core/compile/jaxpr_to_mlir_module_duration', '/jax/core/compile/backend_compile'
OP_NAME = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)
LOOP = re.compile(r'(while|conditional)(\.\d+)?')


class Stopwatch:
    """Training throughput and input stalls; the loop says what happens.

    Batches that `streams` may have to be waited for. Of each lap, `laps` holds the images a
    second, `stalls` the fraction in which the device waited for a batch, `stalled` the last one.
    """

    def __init__(self, batch_size: int, streams: bool = False):
        self.laps: list[float] = []
        self.stalls: list[float] = []
        self.stalled = 0.0
        self._batch_size = batch_size
        self._pool = ThreadPoolExecutor(1) if streams else None
        self._fed, self._compiling = 0.0, 0.0
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._began: float | None = None
        self._pending: Any = None  # results of the last step

    def step(self, results: Any) -> None:
        """Count a dispatched step; the first one compiles, and its end starts the clock."""
        self._pending = results
        if self._began is None:
            jax.block_until_ready(results)
            self._began, self._waited = time.perf_counter(), 0.0
            self._compiling = self._began - self._fed
        else:
            self._steps += 1

    def feed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass on batches, and measure for how long the device had nothing to do meanwhile.

        That is from when the results of the last step are ready. A thread waits for them, some
        milliseconds late if Python is busy: what is told is at most too little.
        """
        self._fed = time.perf_counter()
        if not self._pool:
            yield from batches
            return
        while True:
            began, ready = time.perf_counter(), self._pool.submit(_ready_time, self._pending)
            batch = next(batches)
            if ready.done():
                self._waited += time.perf_counter() - max(began, ready.result())
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens inside; all steps must have ended before."""
        running, self._seconds, self._began = self._began is not None, self._elapsed(), None
        try:
            yield
        finally:
            if running:
                self._began = time.perf_counter()

    def lap(self) -> float:
        """Images a second since the last lap; of the first step alone, with its compilation."""
        steps, seconds, waited = self._steps, max(self._elapsed(), 1e-9), self._waited
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if self._began is not None:
            self._began = time.perf_counter()
        self.stalled = min(waited / seconds, 1.0) if steps else 0.0
        if not steps:
            return self._batch_size / self._compiling if self._compiling else 0.0
        self.laps.append(steps * self._batch_size / seconds)
        self.stalls.append(self.stalled)
        return self.laps[-1]

    def _elapsed(self) -> float:
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return self._seconds + running


def _ready_time(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()


class CompileClock:
    """The `seconds` that JAX spends on lowering and compiling from now on."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._duration)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(COMPILING):
            self.seconds += duration_secs


def training_flops(rows: Iterable[Layer], trainable: Collection[str], cached: str = '') -> int:
    """Multiplications and additions of a training step's matrix products, for one example.

    Σ f·(1 + [its kernel is trained] + [a layer before it is trained]), f those of a layer's
    forward pass (`summary.layers`): a kernel's gradient and an input's cost as much each. With
    `cached` features the backbone computes nothing before its first trained layer.
    """
    total, before = 0, False
    for row in rows:
        trained = any(name.startswith(f'{row.path}/') for name in trainable)
        if before or trained or not (cached and row.path.startswith('backbone/')):
            total += row.flops * (1 + (f'{row.path}/kernel' in trainable) + before)
            before = before or trained
    return total


def measure_peak(dtype: str = 'float32', seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product on the first device, the best in some seconds."""
    size = 2048 if jax.default_backend() == 'cpu' else 8192  # smaller ones end too soon
    a = jnp.ones((size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _peak_memory() -> tuple[int, str]:
    """The most bytes ever held: of the device that held most, on a CPU of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    held = [each['peak_bytes_in_use'] for each in stats if 'peak_bytes_in_use' in each]
    if held and jax.default_backend() != 'cpu':
        return max(held), 'device'
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, 'process'


def measure(
    watches: Sequence[Stopwatch],
    flops: Sequence[int],
    dtype: str,
    clock: CompileClock,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """The facts about a run's speed; measures the machine's peak, so call it after training.

    They are medians over the last phase that was timed; of the stalls without the first lap, in
    which files are read for the first time, where there are others. `flops` are the phases'
    `training_flops`; the clock has been running since the process began.
    """
    facts: dict[str, Any] = {'compile_seconds': clock.seconds}
    facts['peak_memory_bytes'], facts['peak_memory_of'] = _peak_memory()
    timed = [(watch, count) for watch, count in zip(watches, flops) if watch.laps]
    if not timed:
        return facts
    watch, each = timed[-1]
    facts['waiting_share'] = statistics.median(watch.stalls[1:] or watch.stalls)
    owners = [device.process_index for device in layout.mesh.devices.flat] if layout else [0]
    if jax.default_backend() == 'cpu':
        # CPU devices of a process share its threads; bfloat16 is computed in float32 at best.
        owners, dtype = set(owners), 'float32'
    images, peak = statistics.median(watch.laps), measure_peak(dtype) * len(owners)
    return facts | {
        'images_per_second': images,
        'flops_per_image': each,
        'flops_per_second': images * each,
        'peak_flops_per_second': peak,
        'fraction_of_peak': images * each / peak,
        'peak_dtype': dtype,
    }


def speed_line(facts: dict[str, Any]) -> str:
    """The facts of `measure` in one line; advice in a line before it if input stalls."""
    speed, advice = 'not measured: no step but a compiling one was trained', ''
    if 'images_per_second' in facts:
        speed = (
            f'{facts["images_per_second"]:,.0f} images/s · '
            f'{facts["flops_per_second"] / 1e9:,.1f} GFLOP/s, {facts["fraction_of_peak"]:.0%} of '
            f'the {facts["peak_flops_per_second"] / 1e9:,.0f} of a {facts["peak_dtype"]} matrix '
            'product'
        )
    if (stalled := facts.get('waiting_share', 0.0)) > STALLED:
        advice = (
            f'the device waited for data {stalled:.0%} of the time: reading and decoding on '
            f'{count(cores(), "core")} is slower than training. Give the process more cores, store '
            'the images at the size that the net takes, or set config.data.memory_gb above the '
            'size of the decoded images, which are then decoded once and stay on the device\n'
        )
    return (
        f'{advice}speed: {speed} · compiling {facts["compile_seconds"]:.1f} s · '
        f'peak memory {facts["peak_memory_bytes"] / 1e9:.2f} GB ({facts["peak_memory_of"]})'
    )


def write_speed(folder: Path, facts: dict[str, Any]) -> None:
    """Write `speed.json`, unless nothing was timed: an earlier one then stays."""
    if 'images_per_second' in facts:
        write_text(folder / 'speed.json', json.dumps(facts, indent=2) + '\n')


def trace(
    folder: Path,
    layers: Sequence[str],
    steps: Iterable[Any],
    values: Any,
    watch: Callable[[Any], Stopwatch],
    say: Callable[[str], object],
) -> Iterator[Any]:
    """Pass on the steps of `train.loop.steps`, and `say` which layers the time of some went to.

    `STEPS` of one phase are traced, after `WARM` of it: the first compiles. Each run has its own
    subfolder of `folder`; `layers` are paths in the network, `watch` leads from a phase to its
    stopwatch.
    """
    done, began, traced = 0, 0.0, False
    try:
        for taken in steps:
            done, last = done + 1, taken.number == taken.phase.end
            if began and (done == WARM + STEPS or last):
                jax.block_until_ready(taken.state)
                wall, count, began = time.perf_counter() - began, done - WARM, 0.0
                with watch(taken.phase).paused():
                    jax.profiler.stop_trace()
                    session = max(folder.glob('plugins/profile/*'))
                    program = taken.phase.train_step.lower(taken.state, taken.batch, values)
                    rows = layer_times(session, program.compile().as_text(), layers)
                    first, each = taken.number - count + 1, wall / count * 1e3
                    say(
                        f'profile of steps {first} to {taken.number}, {each:,.1f} ms a step; the '
                        'largest parts, ms:'
                    )
                    for name, spent in rows.most_common(ROWS):
                        say(f'  {name:<40} {spent / count * 1e3:9.2f}  {spent / rows.total():6.1%}')
                    say(f'  trace: open {session}/perfetto_trace.json.gz in ui.perfetto.dev')
            yield taken
            if last:
                done = 0
            elif done == WARM and not traced:
                jax.block_until_ready(taken.state)
                jax.profiler.start_trace(folder, create_perfetto_trace=True)
                traced, began = True, time.perf_counter()
    finally:
        if began:  # the run was stopped
            jax.profiler.stop_trace()
    if not traced:
        say('no profile: it needs three steps, the first two of which are not traced')


def operations(session: Path, program: str = '') -> list[tuple[float, float, str]]:
    """The operations in a trace's folder by their start, of one program or all: start, end, name.

    A loop spans its body's operations, which are listed themselves, so it is left out.
    """
    planes = (jax.profiler.ProfileData.from_file(str(p)).planes for p in session.glob('*.pb'))
    found = []
    for line in (line for each in planes for plane in each for line in plane.lines):
        for event in line.events:
            stats: dict[str, Any] = {name: value for name, value in event.stats if name}
            module, op = stats.get('hlo_module', '').split('(')[0], stats.get('hlo_op', '')
            if module and program in ('', module) and not LOOP.fullmatch(op):
                found.append((event.start_ns / 1e9, event.end_ns / 1e9, op))
    return sorted(found)


def layer_times(session: Path, program: str, layers: Sequence[str]) -> collections.Counter[str]:
    """Seconds of each layer's forward and backward pass, and of the rest, in a trace's folder.

    JAX's name of an operation in the program's text tells both, e.g.
    `jit(train)/transpose(jvp(Net))/conv1/mul`; a fused one has the name of one of its parts. XLA's
    CPU client records of a convolution or a product the start alone: it lasts until the next
    operation starts. Of operations that overlap, the one that started last has the time.
    """
    [module], names = re.findall(r'\AHloModule ([\w.-]+)', program), dict(OP_NAME.findall(program))
    events = operations(session, module)
    rows: Any = collections.Counter()
    for (start, end, op), following in itertools.zip_longest(events, events[1:]):
        if following and (end > following[0] or re.match('convolution|dot', op)):
            end = following[0]
        name, row = names.get(op, ''), 'optimizer and rest'
        if 'jvp(' in name:
            inside = [layer for layer in layers if f'/{layer}/' in f'{name}/']
            row = max(inside, key=len, default='activations and loss')
            row += ' backward' if 'transpose(jvp(' in name else ' forward'
        rows[row] += end - start
    return rows
