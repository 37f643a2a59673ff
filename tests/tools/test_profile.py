"""Speed, input stalls and the profile: on clocks that tests set, and on real runs."""

import contextlib
import json
import re
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data.batches import DeviceBatches, StreamBatches
from cnn_jax.models import build
from cnn_jax.summary import layers
from cnn_jax.tools import profile
from cnn_jax.tools.profile import CompileClock, LayerProfile, Stopwatch, measure, training_flops
from cnn_jax.train import loop
from cnn_jax.train.program import state_maker, traced_values
from tests.train.conftest import compiled, opened

VGG = {'model__name': 'vgg16', 'model__cut': 'block1_pool', 'train__frozen': ('backbone/*',)}
LAYERS = ['block1_conv1', 'block1_conv2', 'block1_norm1', 'head/dense1', 'head/dense10']


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Results:
    """The results of a step that ends at a time; also the future of that time."""

    def __init__(self, clock, at):
        self._clock, self._at = clock, at

    def is_ready(self):
        return self._at <= self._clock.now

    done = is_ready

    def result(self):
        assert self.is_ready()
        return self._at


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(profile.time, 'perf_counter', made)
    return made


@pytest.fixture
def watch(clock):
    """Makes a running stopwatch of a run that streams; its thread is the fake future itself."""

    def make(**options):
        made = Stopwatch(8, streams=True, **options)
        made._pool = SimpleNamespace(submit=lambda _, results: results)
        made.step({})
        return made

    return make


@pytest.fixture
def peak(monkeypatch):
    """No matrix product is timed."""
    monkeypatch.setattr(profile, 'measure_peak', lambda dtype: 2e11)


def test_laps_count_running_time_alone_and_not_the_first_step(clock):
    watch = Stopwatch(8)
    clock.now += 2.0
    watch.step({})  # compiles
    assert watch.lap() == 4  # told, not kept
    for seconds in (3.0, 4.0):
        clock.now += seconds
        watch.step({})
    with watch.paused():
        clock.now += 100.0
        assert watch.lap() == 2 * 8 / 7
    clock.now += 2.0
    watch.step({})
    watch.discard()  # a profile
    clock.now += 4.0
    watch.step({})
    assert watch.lap() == 2
    assert watch.laps == [16 / 7, 2]


@pytest.mark.parametrize(
    ('busy', 'stalled'),
    [(None, 7.0), (0.0, 7.0), (3.0, 4.0), (7.0, 0.0), (9.0, 0.0)],
    ids=['before the first step', 'idle', 'busy at first', 'busy until then', 'busy longer'],
)
def test_a_stall_is_the_time_in_which_the_device_has_nothing_to_do(clock, watch, busy, stalled):
    running = watch()
    with running.waiting(None if busy is None else Results(clock, busy)):
        clock.now += 7.0
    clock.now += 3.0
    running.step({})
    running.lap()
    assert running.stalled == stalled / 10


@pytest.mark.parametrize(('read', 'stalled'), [(0.0, 0.0), (2.0, 0.0), (4.0, 0.25), (30.0, 0.9)])
def test_a_source_slower_than_the_steps_is_found(clock, watch, read, stalled):
    """Steps of 3 s, begun when both their batch and the device are there."""
    running, free = watch(), 0.0
    for _ in range(50):
        free = max(free, clock.now) + 3.0
        with running.waiting(Results(clock, free)):
            clock.now += read
        clock.now = max(clock.now, free - 3.0)  # the loop is at most a step ahead
        running.step({})
    running.lap()
    assert running.stalls == [pytest.approx(stalled, abs=0.01)]


def test_pauses_and_images_on_the_device_are_no_stalls(clock, watch):
    assert (DeviceBatches.streams, StreamBatches.streams) == (False, True)
    streaming, resident = watch(), Stopwatch(8)
    resident.step({})
    for running in (streaming, resident):
        with running.waiting(Results(clock, 0.0)):
            clock.now += 1.0
        clock.now += 3.0
        running.step({})
        with running.paused():
            clock.now += 50.0
        running.lap()
    assert (streaming.stalls, resident.stalls) == ([0.25], [0.0])


def test_a_run_has_a_lap_for_each_evaluation(small, fit):
    config = small(train__epochs=3.0, train__eval_every=1.0)
    outcome = fit(config, count=40)
    assert [len(laps) for laps in outcome.speeds] == [len(laps) for laps in outcome.stalls] == [3]
    assert all(lap > 0 for lap in outcome.speeds[0])
    assert fit(config, count=40).speeds == [[]]  # nothing was left to train


@pytest.mark.usefixtures('peak')
@pytest.mark.parametrize(
    ('laps', 'stalled'), [([0.9], 0.9), ([0.9, 0.1], 0.1), ([0.9, 0.3, 0.05, 0.2], 0.2)]
)
def test_stalls_are_reported_without_the_first_lap_where_there_are_others(laps, stalled):
    speeds, clock = [[5.0] * len(laps), []], CompileClock()
    facts = measure(speeds, [1, 1], 'float32', clock, stalls=[laps, []])
    assert facts['waiting_share'] == stalled
    assert 'waiting_share' not in measure(speeds, [1, 1], 'float32', clock)
    *advice, line = profile.speed_line(facts).splitlines()
    assert line.startswith('speed: ')
    assert ('config.data.memory_gb' in ''.join(advice)) == (stalled > profile.STALLED)


@pytest.mark.usefixtures('peak')
def test_the_line_tells_all_and_the_file_keeps_it(tmp_path):
    clock = CompileClock()
    clock.hits = 2
    facts = measure([[3.0], [900.0, 1000.0, 5000.0]], [7, 50_000_000], 'bfloat16', clock)
    line = profile.speed_line(facts)
    assert '1,000 images/s · 50.0 GFLOP/s, 25% of the 200 of a float32 matrix product' in line
    assert 'compiling 0.0 s, all from the compile cache' in line
    assert 0.05e9 < facts['peak_memory_bytes'] < 1e12
    nothing = measure([[], []], [7, 9], 'float32', clock)
    assert profile.speed_line(nothing).startswith('speed: not measured')
    for each in (facts, nothing):
        profile.write_speed(tmp_path, each)
    assert json.loads((tmp_path / 'speed.json').read_text()) == facts


@pytest.mark.usefixtures('peak')
@pytest.mark.parametrize(('platform', 'units'), [('cpu', 2), ('gpu', 8)])
def test_the_peak_is_that_of_all_devices_of_the_layout(platform, units, monkeypatch):
    """Eight devices of two processes: on CPUs, those of a process share its threads."""
    devices = np.array([SimpleNamespace(process_index=k // 4) for k in range(8)]).reshape(4, 2)
    layout: Any = SimpleNamespace(mesh=SimpleNamespace(devices=devices))
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    facts = measure([[10.0]], [10**10], 'float32', CompileClock(), layout=layout)
    assert facts['fraction_of_peak'] == 0.5 / units


def test_the_peak_is_that_of_a_matrix_product():
    assert 1e9 < profile.measure_peak(seconds=0.05) < 1e14


def test_compiling_is_timed_once_however_deep():
    clock, began = CompileClock(), time.perf_counter()
    inner = jax.jit(lambda x: x * 3.25 + 1.0)
    jax.block_until_ready(jax.jit(lambda x: inner(inner(x)) - 0.125)(jnp.ones(3)))
    assert 0 < clock.seconds <= time.perf_counter() - began


@pytest.fixture
def rows():
    """Makes the layers of a config's net."""
    return lambda config, shape: layers(build(config.model, 3), shape)


def test_the_count_is_what_xla_counts_in_the_compiled_step(small, run, batch, rows):
    # VALID: XLA does not count the products with padding.
    config = small(model__widths=(48, 64), model__hidden=(8,), model__padding='VALID')
    program, state, values = run(config, (32, 32, 3), prepare=lambda images: images / 255.0)
    lowered = compiled(program).lower(state, batch(shape=(32, 32, 3)), values)
    counted: Any = lowered.compile().cost_analysis()
    flops = 8 * training_flops(rows(config, (32, 32, 3)), program.trainable)
    assert flops == pytest.approx(counted['flops'], rel=0.1)


def test_gradients_that_nobody_needs_are_not_counted(small, run, rows):
    f = {row.path: row.flops for row in rows(small(), (8, 8, 1))}
    total, first = sum(f.values()), f['block1_conv1']

    def flops(**changes):
        config = small(**changes)
        return training_flops(rows(config, (8, 8, 1)), run(config)[0].trainable)

    assert flops() == 3 * total - first
    head = f['head/dense1'] + f['head/logits']
    assert flops(train__frozen=('block*',)) == total + 2 * head - f['head/dense1']
    unfrozen = total - first - f['block1_conv2']
    assert flops(train__frozen=('block1_*',)) == total + 2 * unfrozen - f['block2_conv1']


def test_on_cached_features_the_head_alone_counts(small, run, rows):
    config = small(**VGG)
    table = rows(config, (32, 32, 3))
    f = {row.path: row.flops for row in table}
    program, *_ = run(config, (32, 32, 3), prepare=lambda images: images / 255.0)
    head = 2 * f['head/dense1'] + 3 * f['head/logits']
    backbone = sum(flops for path, flops in f.items() if path.startswith('backbone/'))
    assert training_flops(table, program.trainable, cached=True) == head
    assert training_flops(table, program.trainable) == head + backbone


def test_the_times_of_a_layer_add_up():
    """A convolution, whose end is not recorded, lasts until the next operation."""
    names = {
        'convolution.1': 'jvp(N)/block1_conv1/mul',
        'add.1': 'transpose(jvp(N))/block1_norm1/sub',
        'dot.1': 'jvp(N)/head/dense1/dot_general',
        'dot.2': 'jvp(N)/head/dense10',
        'add.2': 'jvp(N)/jit(relu)/max',
        'add.3': 'sqrt',
    }
    program = 'HloModule jit_train, is_scheduled=true\n' + '\n'.join(
        f'  ROOT %{op} = f32[] op(a), metadata={{op_type="op" op_name="jit(train)/{name}" line=3}}'
        for op, name in names.items()
    )
    ops = [*names, 'copy.7', 'convolution.1', 'add.3']
    events = [(2.0 * k, 2.0 * k + 0.5, op) for k, op in enumerate(ops)]
    assert profile.layer_times(events, program, LAYERS) == {
        'block1_conv1 forward': 4.0,
        'block1_norm1 backward': 0.5,
        'head/dense1 forward': 2.0,
        'head/dense10 forward': 2.0,
        'activations and loss forward': 0.5,
        'optimizer and rest': 1.5,
    }


@pytest.mark.parametrize(('count', 'traced'), [(10, '3 to 7'), (4, '3 to 4'), (2, '')])
def test_a_real_run_names_its_layers(small, tmp_path, count, traced):
    """Also in a phase that ends early; one of two steps has none to trace."""
    config, said = small(train__epochs=count / 6.25, data__batch=8), []
    spec, (phase,) = opened(config)
    values, state = traced_values(config), state_maker(phase.program)(0)
    tracer = LayerProfile(tmp_path / 'profile', ['block1_conv1', 'block2_norm1', 'head/dense1'])
    steps = loop.steps([phase], state, 0, values)
    numbers = [
        taken.number
        for taken in tracer.trace(steps, values, lambda _: contextlib.nullcontext(), said.append)
    ]
    assert numbers == list(range(1, spec.phase_ends[-1] + 1)) == list(range(1, count + 1))
    assert (tracer.taken, len(said)) == (bool(traced), int(bool(traced)))
    if not traced:
        return
    head, *rows, trace, _ = said[0].splitlines()
    [wall] = re.findall(rf'profile of steps {traced}, ([\d.]+) ms a step', head)
    times = {row[:42].strip(): float(row.split()[-2]) for row in rows}
    for layer in ('block1_conv1', 'block2_norm1', 'head/dense1'):
        assert {f'{layer} forward', f'{layer} backward'} & times.keys(), layer
    assert 0 < sum(times.values()) <= float(wall) * 1.02
    assert [path.name for path in tmp_path.glob('profile/plugins/profile/*/*.gz')]
    assert str(tmp_path) in trace
