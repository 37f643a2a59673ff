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
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
COMPILING = tuple(
    f'/jax/core/compile/{name}_duration'
    for name in ('jaxpr_trace', 'jaxpr_to_mlir_module', 'backend_compile')
)
OP_NAME = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


class Stopwatch:
    """Training throughput and input stalls; the loop says what happens, the stopwatch only reads
    the clock.

    Args:
        batch_size: Images a step.
        streams: The batches are read while training, so they may have to be waited for.

    Attributes:
        laps: Images a second of each lap.
        stalls: The fraction of each lap in which the device waited for a batch.
        stalled: That of the last lap; 0 where nothing was timed.
    """

    def __init__(self, batch_size: int, streams: bool = False):
        self.laps: list[float] = []
        self.stalls: list[float] = []
        self.stalled = 0.0
        self._batch_size = batch_size
        self._pool = ThreadPoolExecutor(1) if streams else None
        self._created, self._compiling = time.perf_counter(), 0.0
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._began: float | None = None

    def step(self, results: Any) -> None:
        """Count a step that was dispatched.

        The first one compiles: it is waited for and not counted, and its end starts the clock.
        """
        if self._began is None:
            jax.block_until_ready(results)
            self._began = time.perf_counter()
            self._compiling = self._began - self._created
            self._waited = 0.0
        else:
            self._steps += 1

    @contextlib.contextmanager
    def waiting(self, pending: Any) -> Iterator[None]:
        """Surround the taking of a batch: measures for how long the device had nothing to do.

        That is from when the last step's results are ready, or from here if they are already. A
        thread waits for them; it may be some milliseconds late when Python is busy, so that what
        is measured is at most too little.

        Args:
            pending: An array that the last step computes, or None before the first.
        """
        if self._pool is None:
            yield
            return
        ready: Future[float] | None = None
        if pending is not None and not pending.is_ready():
            ready = self._pool.submit(_ready_time, pending)
        idle = began = time.perf_counter()
        yield
        ended = time.perf_counter()
        if ready:
            idle = max(began, ready.result()) if ready.done() else ended
        self._waited += max(ended - idle, 0.0)

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
        """Images a second since the last lap; where only the first step was taken, with its
        compilation.
        """
        steps, seconds, waited = self._steps, max(self._elapsed(), 1e-9), self._waited
        self.discard()
        self.stalled = min(waited / seconds, 1.0) if steps else 0.0
        if not steps:
            return self._batch_size / self._compiling if self._compiling else 0.0
        self.laps.append(steps * self._batch_size / seconds)
        self.stalls.append(self.stalled)
        return self.laps[-1]

    def discard(self) -> None:
        """Forget what was measured since the last lap."""
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if self._began is not None:
            self._began = time.perf_counter()

    def _elapsed(self) -> float:
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return self._seconds + running


def _ready_time(array: Any) -> float:
    jax.block_until_ready(array)
    return time.perf_counter()


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
        """Wall time so far: a function traced inside of another one counts once."""
        total, end = 0.0, 0.0
        for start, stop in sorted(self._spans):
            total += max(stop - max(start, end), 0.0)
            end = max(end, stop)
        return total


def training_flops(rows: Iterable[Layer], trainable: Collection[str], cached: bool = False) -> int:
    """Multiplications and additions of a training step's matrix products, for one example.

    Σ f·(1 + [its kernel is trained] + [a layer before it is trained]), f those of a layer's
    forward pass: the gradients of a layer's kernel and of its input cost as much each, and the
    latter is needed only where something before it is trained.

    Args:
        rows: Layers in the order of their calls (`summary.layers`).
        trainable: Paths of the trained parameters.
        cached: The backbone's features are cached, so that it computes nothing.
    """
    total, before = 0, False
    for row in rows:
        if cached and row.path.startswith('backbone/'):
            continue
        total += row.flops * (1 + (f'{row.path}/kernel' in trainable) + before)
        before = before or any(name.startswith(f'{row.path}/') for name in trainable)
    return total


def measure_peak(dtype: str = 'float32', seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on the first device, the best in some seconds."""
    size = 2048 if jax.default_backend() == 'cpu' else 8192  # smaller ones end too soon
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
    speeds: Sequence[Sequence[float]],
    flops: Sequence[int],
    dtype: str,
    clock: CompileClock,
    *,
    stalls: Sequence[Sequence[float]] = (),
    layout: Layout | None = None,
) -> dict[str, Any]:
    """The facts about a run's speed; measures the machine's peak, so call it after training.

    The last phase that was timed counts: the median of its laps, for stalls without the first
    one, in which files are read for the first time, if there are others.

    Args:
        speeds, stalls: `Stopwatch.laps` and `Stopwatch.stalls` of each phase.
        flops: `training_flops` of each phase.
        dtype: Type of the net's computation.
        clock: Clock that has been running since the process began.
        layout: Layout of the run, on several devices.
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
    last = timed[-1]
    if stalls and stalls[last]:
        facts['waiting_share'] = statistics.median(stalls[last][1:] or stalls[last])
    owners = [device.process_index for device in layout.mesh.devices.flat] if layout else [0]
    if jax.default_backend() == 'cpu':
        # CPU devices of a process share its threads; bfloat16 is computed in float32 at best.
        owners, dtype = set(owners), 'float32'
    images, peak = statistics.median(speeds[last]), measure_peak(dtype) * len(owners)
    return {
        'images_per_second': images,
        'flops_per_image': flops[last],
        'flops_per_second': images * flops[last],
        'peak_flops_per_second': peak,
        'fraction_of_peak': images * flops[last] / peak,
        'peak_dtype': dtype,
    } | facts


def speed_line(facts: dict[str, Any]) -> str:
    """The facts of `measure` in one line; advice in a line before it if input stalls."""
    cache = ''
    if facts['programs_from_cache'] and not facts['programs_compiled']:
        cache = ', all from the compile cache'
    cost = (
        f'compiling {facts["compile_seconds"]:.1f} s{cache} · '
        f'peak memory {facts["peak_memory_bytes"] / 1e9:.2f} GB ({facts["peak_memory_of"]})'
    )
    if 'images_per_second' not in facts:
        return f'speed: no step trained · {cost}'
    line = (
        f'speed: {facts["images_per_second"]:,.0f} images/s · '
        f'{facts["flops_per_second"] / 1e9:,.1f} GFLOP/s, {facts["fraction_of_peak"]:.0%} of the '
        f'{facts["peak_flops_per_second"] / 1e9:,.0f} of a {facts["peak_dtype"]} matrix product · '
        f'{cost}'
    )
    stalled = facts.get('waiting_share', 0.0)
    if stalled <= STALLED:
        return line
    return (
        f'the device waited for data {stalled:.0%} of the time: reading and decoding on '
        f'{count(cores(), "core")} is slower than training. Give the process more cores, store the '
        'images at the size that the net takes, or set config.data.memory_gb above the size of the '
        f'decoded images, which are then decoded once and stay on the device\n{line}'
    )


def write_speed(folder: Path, facts: dict[str, Any]) -> None:
    """Write `speed.json`, unless no step was trained and an earlier run's holds."""
    if 'images_per_second' in facts:
        write_text(folder / 'speed.json', json.dumps(facts, indent=2) + '\n')


class LayerProfile:
    """Traces `STEPS` steps of a run with JAX's profiler, and tells the time of each layer.

    Args:
        folder: Folder of the traces, one in it for each run.
        layers: Paths of the network's layers (`summary.layers`).

    Attributes:
        taken: Whether there was a step to trace.
    """

    def __init__(self, folder: Path, layers: Sequence[str]):
        self._folder, self._layers = folder, layers
        self.taken = False
        self._done = 0
        self._began: float | None = None

    def before(self, state: Any) -> None:
        """Start the trace if it is time, and the steps that lead to this state have ended."""
        if self._done == WARM and not self.taken:
            self.taken = True
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._began = time.perf_counter()

    def after(self, step: int, train_step: Any, arguments: tuple, last: bool) -> str:
        """The table, once the last traced step has ended; '' before and later.

        `arguments` are the next ones of the jitted `train_step`; after the `last` step of a phase
        the next compiles anew.
        """
        self._done += 1
        traced = self._done - WARM
        if self._began is None:
            self._done = 0 if last else self._done
            return ''
        if traced < STEPS and not last:
            return ''
        jax.block_until_ready(arguments)
        wall, self._began = time.perf_counter() - self._began, None
        jax.profiler.stop_trace()
        text = train_step.lower(*arguments).compile().as_text()
        session = max(self._folder.glob('plugins/profile/*'))
        rows = layer_times(operations(session), text, self._layers)
        return '\n'.join(
            [
                f'profile of steps {step - traced + 1} to {step}, '
                f'{wall / traced * 1e3:,.1f} ms a step:',
                *table(rows, traced),
                f'  trace: open {session}/perfetto_trace.json.gz in https://ui.perfetto.dev, or',
                f'  xprof --logdir={self._folder} (pip install xprof)',
            ]
        )


Operation = tuple[str, str, float, float]  # program, HLO operation, start and end in seconds


def operations(session: Path) -> list[Operation]:
    """The HLO operations in a trace's `*.xplane.pb`, by their start.

    A loop spans its body's operations, which are listed themselves, so it is left out.
    """
    listed = []
    for path in session.glob('*.xplane.pb'):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in itertools.chain.from_iterable(line.events for line in plane.lines):
                stats: dict[str, Any] = {name: value for name, value in event.stats if name}
                name = stats.get('hlo_op')
                if name and not re.match(r'(while|conditional)(\.\d+)?$', name):
                    span = event.start_ns / 1e9, event.end_ns / 1e9
                    listed.append((stats.get('hlo_module', ''), name, *span))
    return sorted(listed, key=lambda operation: operation[2])


def layer_times(
    events: list[Operation], program: str, layers: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Seconds of each layer's forward and backward pass, and of the rest; largest first.

    The names in the HLO text of the compiled step tell an operation's layer; a fused operation
    carries that of one of its parts. Of convolutions and products XLA's CPU client records the
    start only: they last, here, until the next operation starts. Of operations that overlap, the
    one that started last has the time.
    """
    [module] = re.findall(r'\AHloModule ([\w.-]+)', program)
    names = dict(OP_NAME.findall(program))
    rows: dict[tuple[str, str], float] = collections.defaultdict(float)
    for event, following in itertools.zip_longest(events, events[1:]):
        origin, name, start, end = event
        row = 'batches, evaluation', ''
        if origin.split('(')[0] == module:
            row = layer_of(names.get(name, ''), layers)
            if re.match('convolution|dot', name) and following and following[0] == origin:
                end = following[2]
        rows[row] += min(end, following[2] if following else end) - start
    return dict(sorted(rows.items(), key=lambda row: -row[1]))


def layer_of(op_name: str, layers: Sequence[str]) -> tuple[str, str]:
    """The layer and the pass of an operation, from its name in the program.

    `jit(train)/transpose(jvp(StridedNet))/block1_conv2/mul` is in the backward pass of
    block1_conv2.
    """
    if 'jvp(' not in op_name:
        return 'optimizer and rest', ''
    direction = 'backward' if 'transpose(jvp(' in op_name else 'forward'
    inside = [layer for layer in layers if f'/{layer}/' in f'{op_name}/']
    return max(inside, key=len, default='activations and loss'), direction


def table(rows: dict[tuple[str, str], float], steps: int) -> list[str]:
    """The lines of a table: milliseconds a step and share of `layer_times`."""
    if not rows:
        return [f'  no operation in the trace: JAX {jax.__version__} records none on this backend']
    total = sum(rows.values())
    lines = [(*row, seconds) for row, seconds in list(rows.items())[:ROWS]]
    if rest := len(rows) - len(lines):
        lines.append((f'{rest} more', '', total - sum(seconds for *_, seconds in lines)))
    lines.append(('total', '', total))
    width = max(len(name) for name, *_ in lines)
    head = f'  {"layer":{width}}  {"pass":8}  {"ms a step":>9}  {"share":>6}'
    return [head] + [
        f'  {name:{width}}  {direction:8}  {seconds / steps * 1e3:9.2f}  {seconds / total:6.1%}'
        for name, direction, seconds in lines
    ]
