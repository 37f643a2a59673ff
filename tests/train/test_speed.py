"""How fast a run was: laps, FLOP, compilations, memory, and the line that tells of them."""

import json
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models import build
from cnn_jax.summary import layers
from cnn_jax.train import speed

VGG = {'model__name': 'vgg16', 'model__cut': 'block1_pool', 'train__frozen': ('backbone/*',)}


@pytest.fixture
def rows():
    """Makes the layers of a config's net."""
    return lambda config, shape: layers(build(config.model, 3), shape)


def test_the_count_is_what_xla_counts_in_the_compiled_step(small, run, batch, rows):
    # VALID: XLA does not count the products with padding.
    config = small(model__widths=(48, 64), model__hidden=(8,), model__padding='VALID')
    steps, state, values = run(config, (32, 32, 3), prepare=lambda images: images / 255.0)
    lowered = jax.jit(steps.train).lower(state, batch(shape=(32, 32, 3)), values)
    counted: Any = lowered.compile().cost_analysis()
    flops = 8 * speed.training_flops(rows(config, (32, 32, 3)), steps)
    assert flops == pytest.approx(counted['flops'], rel=0.1)


def test_gradients_that_nobody_needs_are_not_counted(small, run, rows):
    f = {row.path: row.flops for row in rows(small(), (8, 8, 1))}
    total, first = sum(f.values()), f['block1_conv1']

    def count(**changes):
        config = small(**changes)
        return speed.training_flops(rows(config, (8, 8, 1)), run(config)[0])

    assert count() == 3 * total - first
    head = f['head/dense1'] + f['head/logits']
    assert count(train__frozen=('block*',)) == total + 2 * head - f['head/dense1']
    assert (
        count(train__frozen=('block1_*',))
        == total + 2 * (total - first - f['block1_conv2']) - (f['block2_conv1'])
    )


def test_on_cached_features_the_head_alone_counts(small, run, rows):
    config = small(**VGG)
    table = rows(config, (32, 32, 3))
    f = {row.path: row.flops for row in table}
    cached, whole = (
        run(config, (32, 32, 3), cached=cached, prepare=lambda images: images / 255.0)[0]
        for cached in (True, False)
    )
    head = 2 * f['head/dense1'] + 3 * f['head/logits']
    assert speed.training_flops(table, cached) == head
    assert speed.training_flops(table, whole) == head + sum(
        flops for path, flops in f.items() if path.startswith('backbone/')
    )


def test_a_stopwatch_counts_its_running_time_alone(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 11.0, 20.0, 30.0, 34.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(now))
    watch = speed.Stopwatch(batch=8)
    watch.start(1)
    watch.stop(4)  # 3 steps in 2 s
    watch.start(4)
    watch.stop(5)  # 1 step in 1 s
    assert watch.lap() == 4 * 8 / 3
    watch.start(5)
    watch.drop()
    assert watch.lap() is None
    watch.start(6)
    watch.stop(10)
    assert watch.lap() == 8
    assert watch.laps == [32 / 3, 8]


def test_a_run_has_a_lap_for_each_evaluation(small, fit):
    config = small(train__epochs=3.0, train__eval_every=1.0)
    outcome = fit(config, count=40)
    assert [len(laps) for laps in outcome.speeds] == [3]
    assert all(lap > 0 for lap in outcome.speeds[0])
    assert fit(config, count=40).speeds == [[]]  # nothing was left to train


def test_compiling_is_timed_once_however_deep(monkeypatch):
    clock = speed.CompileClock()
    inner = jax.jit(lambda x: x * 3.25 + 1.0)
    began = time.perf_counter()
    jax.block_until_ready(jax.jit(lambda x: inner(inner(x)) - 0.125)(jnp.ones(3)))
    assert 0 < clock.seconds <= time.perf_counter() - began
    before = clock.seconds
    jax.block_until_ready(jnp.ones(3))
    assert clock.seconds == before


def test_the_peak_is_that_of_a_matrix_product():
    assert 1e9 < speed.calibrated_peak(seconds=0.05) < 1e14


def test_the_line_tells_all_and_the_file_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, 'calibrated_peak', lambda dtype: 2e11)
    clock = speed.CompileClock()
    clock.hits = 2
    facts = speed.measure([[3.0], [900.0, 1000.0, 5000.0]], [7, 50_000_000], 'bfloat16', clock)
    line = speed.line(facts)
    assert '1,000 images/s · 50.0 GFLOP/s, 25% of the 200 of a float32 matrix product' in line
    assert 'compiling 0.0 s, all from the compile cache' in line
    assert 0.05e9 < facts['peak_memory_bytes'] < 1e12
    assert f'peak memory {facts["peak_memory_bytes"] / 1e9:.2f} GB (process)' in line
    speed.write(tmp_path, facts)
    speed.write(tmp_path, speed.measure([[], []], [7, 9], 'float32', clock))
    assert json.loads((tmp_path / 'speed.json').read_text()) == facts


def test_without_a_trained_step_the_cost_is_told():
    clock = speed.CompileClock()
    clock.misses = 1
    line = speed.line(speed.measure([[]], [7], 'float32', clock))
    assert line.startswith('speed: no step trained · compiling 0.0 s · peak memory')


@pytest.mark.parametrize(('platform', 'count'), [('cpu', 2), ('gpu', 8)])
def test_the_peak_is_that_of_all_devices_of_the_layout(platform, count, monkeypatch):
    """Eight devices of two processes: on CPUs, those of a process share its threads."""
    devices = np.array([SimpleNamespace(process_index=k // 4) for k in range(8)]).reshape(4, 2)
    layout: Any = SimpleNamespace(mesh=SimpleNamespace(devices=devices))
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    monkeypatch.setattr(speed, 'calibrated_peak', lambda dtype: 2e9)
    assert (speed.units(layout), speed.units(None)) == (count, 1)
    clock = speed.CompileClock()
    facts = speed.measure([[10.0]], [10**8], 'float32', clock, layout=layout)
    assert facts['peak_flops_per_second'] == count * 2e9
    assert facts['fraction_of_peak'] == 0.5 / count
