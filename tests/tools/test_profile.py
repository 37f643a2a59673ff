"""Speed, input stalls and the profile: on clocks that tests set, and on real runs."""

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
from cnn_jax.tools.profile import CompileClock, Stopwatch, measure, training_flops
from cnn_jax.train import loop
from cnn_jax.train.program import state_maker, traced_values
from tests.train.conftest import compiled, opened

LAYERS = ['block1_conv1', 'block1_conv2', 'block1_norm1', 'head/dense1', 'head/dense10']


class Clock:
    """Stands still unless it is told to go on."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(profile.time, 'perf_counter', made)
    return made


@pytest.fixture
def peak(monkeypatch):
    """No matrix product is timed."""
    monkeypatch.setattr(profile, 'measure_peak', lambda dtype: 2e11)


def timed(laps, stalls=(0.0,)):
    """The stopwatch of a phase with these laps."""
    watch = Stopwatch(8)
    watch.laps, watch.stalls = list(laps), list(stalls)
    return watch


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
    clock.now += 4.0
    watch.step({})
    assert watch.lap() == 2
    assert watch.laps == [16 / 7, 2]


@pytest.mark.parametrize('streams', [True, False])
@pytest.mark.parametrize(
    ('busy', 'stalled'),
    [(0.0, 7.0), (3.0, 4.0), (7.0, 0.0), (9.0, 0.0)],
    ids=['idle', 'busy at first', 'busy until then', 'busy longer'],
)
def test_a_stall_is_the_time_in_which_the_device_has_nothing_to_do(clock, streams, busy, stalled):
    """Neither a pause, nor taking a batch that lies on the device, is one."""
    assert (DeviceBatches.streams, StreamBatches.streams) == (False, True)
    running = Stopwatch(8, streams)
    ready = SimpleNamespace(done=lambda: busy <= clock.now, result=lambda: busy)
    if streams:
        running._pool: Any = SimpleNamespace(submit=lambda *_: ready)
    running.step({})

    def slow():
        clock.now += 7.0
        yield 'a batch'

    assert next(running.feed(slow())) == 'a batch'
    clock.now += 3.0
    running.step({})
    with running.paused():
        clock.now += 50.0
    running.lap()
    assert running.stalls == [streams * stalled / 10]


def test_a_run_has_a_lap_for_each_evaluation(small, fit):
    config = small(train__epochs=3.0, train__eval_every=1.0)
    (watch,) = fit(config, count=40).watches
    assert len(watch.laps) == len(watch.stalls) == 3
    assert all(lap > 0 for lap in watch.laps)
    (watch,) = fit(config, count=40).watches
    assert watch.laps == []  # nothing was left to train


@pytest.mark.usefixtures('peak')
def test_the_line_tells_all_and_the_file_keeps_it(tmp_path):
    """Medians of the last phase that was timed; of stalls without the first lap."""
    clock = CompileClock()
    watches = timed([3.0]), timed([900.0, 1000.0, 5000.0], [0.9, 0.3, 0.2]), timed([])
    facts = measure(watches, [7, 50_000_000, 7], 'bfloat16', clock)
    advice, line = profile.speed_line(facts).splitlines()
    assert facts['waiting_share'] == 0.25
    assert 'config.data.memory_gb' in advice
    assert '1,000 images/s · 50.0 GFLOP/s, 25% of the 200 of a float32 matrix product' in line
    assert 'compiling 0.0 s' in line
    assert 0.05e9 < facts['peak_memory_bytes'] < 1e12
    nothing = measure([timed([])], [9], 'float32', clock)
    assert profile.speed_line(nothing).startswith('speed: not measured')
    for each in (facts, nothing):
        profile.write_speed(tmp_path, each)
    assert json.loads((tmp_path / 'speed.json').read_text()) == facts
    (once,) = profile.speed_line(measure([timed([5.0])], [1], 'float32', clock)).splitlines()
    assert once.startswith('speed: ')


@pytest.mark.usefixtures('peak')
@pytest.mark.parametrize(('platform', 'units'), [('cpu', 2), ('gpu', 8)])
def test_the_peak_is_that_of_all_devices_of_the_layout(platform, units, monkeypatch):
    """Eight devices of two processes: on CPUs, those of a process share its threads."""
    devices = np.array([SimpleNamespace(process_index=k // 4) for k in range(8)]).reshape(4, 2)
    layout: Any = SimpleNamespace(mesh=SimpleNamespace(devices=devices))
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    facts = measure([timed([10.0])], [10**10], 'float32', CompileClock(), layout)
    assert facts['fraction_of_peak'] == 0.5 / units


def test_compiling_is_timed_once_however_deep():
    clock, began = CompileClock(), time.perf_counter()
    inner = jax.jit(lambda x: x * 3.25 + 1.0)
    jax.block_until_ready(jax.jit(lambda x: inner(inner(x)) - 0.125)(jnp.ones(3)))
    assert 0 < clock.seconds <= time.perf_counter() - began


@pytest.mark.usefixtures('xla_convolutions')
@pytest.mark.parametrize('frozen', [(), ('block1_*',)], ids=str)
def test_the_count_is_what_xla_counts_in_the_compiled_step(small, run, batch, frozen):
    # VALID: XLA does not count the products with padding.
    wide = {'model__widths': (48, 64), 'model__padding': 'VALID'}
    config = small(train__frozen=frozen, **wide)
    program, state, values = run(config, (32, 32, 3), prepare=lambda images: images / 255.0)
    lowered = compiled(program).lower(state, batch(shape=(32, 32, 3)), values)
    counted: Any = lowered.compile().cost_analysis()
    flops = training_flops(layers(build(config.model, 3), (32, 32, 3)), program.trainable)
    assert 8 * flops == pytest.approx(counted['flops'], rel=0.1)


def test_on_cached_features_the_head_alone_counts(small, run):
    frozen = {'model__cut': 'block1_pool', 'train__frozen': ('backbone/*',)}
    config = small(model__name='vgg16', **frozen)
    rows = layers(build(config.model, 3), (32, 32, 3))
    f = {row.path: row.flops for row in rows}
    program, *_ = run(config, (32, 32, 3), prepare=lambda images: images / 255.0)
    head = 2 * f['head/dense1'] + 3 * f['head/logits']
    backbone = sum(flops for path, flops in f.items() if path.startswith('backbone/'))
    assert training_flops(rows, program.trainable, cached='block1_pool') == head
    assert training_flops(rows, program.trainable) == head + backbone


def test_the_times_of_a_layer_add_up(monkeypatch, tmp_path):
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
    events = [
        SimpleNamespace(
            start_ns=2e9 * k, end_ns=2e9 * k + 5e8, stats=[('hlo_op', op), ('hlo_module', module)]
        )
        for k, op in enumerate([*names, 'copy.7', 'convolution.1', 'add.3', 'while.2'])
        for module in ('jit_train', 'jit_other')
    ]
    plane = SimpleNamespace(lines=[SimpleNamespace(events=events[::-1])])
    data = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=[plane]))
    monkeypatch.setattr(jax.profiler, 'ProfileData', data)
    (tmp_path / 'a.xplane.pb').touch()
    assert profile.layer_times(tmp_path, program, LAYERS) == {
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
    _, (phase,) = opened(small(train__epochs=count / 6.25))
    values, state = traced_values(phase.program.config), state_maker(phase.program)(0)
    layers, said = ['block1_conv1', 'block2_norm1', 'head/dense1'], []
    steps = loop.steps([phase], state, 0, values)
    watch = Stopwatch(8)
    traced_steps = profile.trace(tmp_path, layers, steps, values, lambda _: watch, said.append)
    assert [taken.number for taken in traced_steps] == list(range(1, count + 1))
    if not traced:
        assert said == ['no profile: it needs three steps, the first two of which are not traced']
        return
    head, *rows, trace = said
    [wall] = re.findall(rf'profile of steps {traced}, ([\d.]+) ms a step', head)
    times = {row[:42].strip(): float(row.split()[-2]) for row in rows}
    for layer in layers:
        assert {f'{layer} forward', f'{layer} backward'} & times.keys(), layer
    assert 0 < sum(times.values()) <= float(wall) * 1.02
    assert re.findall(r'open (\S+) in', trace)[0] in map(
        str, tmp_path.glob('plugins/profile/*/*.gz')
    )
