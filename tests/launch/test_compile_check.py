"""Compiling for TPUs that are not here, with a libtpu of the suite's own."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder
from cnn_jax.models import build
from cnn_jax.tools import compile_check
from cnn_jax.tools.compile_check import (
    CHIPS,
    HOP,
    Chip,
    Collective,
    Target,
    collectives,
    host_transfers,
    parse_target,
    seconds_on_links,
)
from experiments.baseline import get_config

ROOT = Path(__file__).resolve().parents[2]
BASELINE = '--config=experiments/baseline.py'

# libtpu is published for these alone.
PUBLISHED = sys.platform == 'linux' and platform.machine() == 'x86_64'


def program(*lines: str, before: str = '') -> str:
    body = '\n'.join(f'  {line}' for line in lines)
    return f'HloModule jit_f\n\n{before}\nENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n'


@pytest.mark.parametrize('name', ['v5e:1x1', 'v5e:16x16', 'v6e:2x4', 'v5p:2x2x1'])
def test_a_target_is_a_chip_and_its_sides(name):
    target = parse_target(f' {name}')
    assert f'{target.name.partition(":")[0]}:{"x".join(map(str, target.sides))}' == name
    assert target.chip is CHIPS[name[:3]]


@pytest.mark.parametrize('name', ['', 'v5e', 'v5e:', 'v5e:8', 'v5e:2x', 'v5e:0x2', 'v5e:2x2x2'])
def test_other_names_are_mistakes_with_an_example(name):
    with pytest.raises(UserError, match=r'v5e:2x4'):
        parse_target(name)


@pytest.mark.parametrize('chip', CHIPS.values(), ids=CHIPS)
def test_units_are_plausible(chip):
    # More arithmetic than memory and more memory than links move: a slip of 1000 would show.
    assert 100 < chip.peak / chip.bandwidth < 1000
    assert 2 < chip.bandwidth / (chip.link * 2 * chip.axes) < 20
    assert 8e9 < chip.memory < 200e9


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ('%a = (f32[4]{0:T(8,128)S(1)}, bf16[2,3]{1,0}) all-reduce(%x, %y)', ('all-reduce', 28)),
        ('%g = f32[8]{0} all-gather(%x), dimensions={0}', ('all-gather', 32)),
        ('%s = f32[4]{0} reduce-scatter(%x), dimensions={0}', ('reduce-scatter', 128)),
        ('ROOT %t = f32[4]{0} all-to-all(%x)', ('all-to-all', 16)),
        ('%p = pred[4]{0} collective-permute(%x)', ('collective-permute', 4)),
        ('%a = f32[4]{0} all-reduce-start(%x)', ('all-reduce', 16)),
        ('%c = (f32[4]{0}, f32[8]{0}) all-gather-start(%x)', ('all-gather', 32)),
        (
            '%e = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%x)',
            ('collective-permute', 16),
        ),
    ],
)
def test_a_collective_counts_the_whole_array_once(line, expected):
    text = program(line, '%b = f32[4]{0} all-reduce-done(%a)', '%f = f32[9]{0} add(%x, %x)')
    assert collectives(text, 8) == [Collective(*expected, 8)]


@pytest.mark.parametrize(
    ('groups', 'size'),
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', 4),
        ('replica_groups=[4,2]<=[8]', 2),
        ('replica_groups=[2,4]<=[4,2]T(1,0)', 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("replica_groups=mesh['data'=4,'model'=2] {'data','model'}", 8),
        ('replica_groups={}', 8),
        ('channel_id=1', 8),
    ],
)
def test_the_size_of_a_group(groups, size):
    text = program(f'%r = f32[3]{{0}} all-reduce(%a), {groups}, to_apply=%s')
    assert collectives(text, 8) == [Collective('all-reduce', 12, size)]


def test_a_fused_reduce_scatter_is_one():
    inner = (
        '%all-reduce-scatter.3 (p: f32[8]) -> f32[2] {\n'
        '  %r = f32[8]{0} all-reduce(%p), to_apply=%s\n'
        '  ROOT %d = f32[2]{0} dynamic-slice(%r, %i)\n}\n'
    )
    text = program('%f = f32[2]{0} fusion(%x), calls=%all-reduce-scatter.3', before=inner)
    assert collectives(text, 4) == [Collective('reduce-scatter', 32, 4)]


def test_host_transfers_are_found_wherever_they_are():
    text = program(
        '%i = ((f32[2]{0}), token[]) infeed(%t)',
        '%d = token[] send-done(%s), channel_id=1',
        '%c = f32[2]{0} custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"',
        '%m = f32[2]{0} custom-call(%x), custom_call_target="MoveToHost"',
        '%k = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call"',
    )
    assert host_transfers(text) == ['infeed', 'xla_ffi_python_cpu_callback', 'MoveToHost']
    assert not host_transfers(program('%x = f32[2]{0} add(%a, %b)'))


@pytest.mark.parametrize(
    ('kind', 'sides', 'seconds', 'hops'),
    [
        # A line of two chips, 40 bytes: one half crosses a link of 5 bytes/s, in 4 s.
        ('all-gather', (1, 2), 4, 1),
        ('reduce-scatter', (1, 2), 4, 1),
        ('all-reduce', (1, 2), 8, 2),
        ('all-to-all', (1, 2), 2, 0.5),
        ('collective-permute', (1, 2), 8, 1),
        # A ring uses both directions: 3/4 of 40 bytes at 10 bytes/s.
        ('all-gather', (1, 4), 3, 3),
        # The second side moves what the first has left: half of 40 at 5, then 3/4 of 20 at 10.
        ('all-gather', (2, 4), 5.5, 4),
    ],
)
def test_communication_among_all_chips(kind, sides, seconds, hops):
    toy = Target('toy', Chip(100.0, 1000.0, 10.0, 5.0, 2, 4), sides)
    time = seconds_on_links(Collective(kind, 40, sides[0] * sides[1]), toy)
    assert time == pytest.approx(seconds + hops * HOP, rel=1e-9)


def test_the_cost_of_a_program_follows_from_its_counts():
    """Compiled for this CPU, for which the counts can be checked by hand."""
    a = jnp.ones((64, 32))
    compiled = jax.jit(lambda x: x @ x.T, donate_argnums=()).lower(a).compile()
    cost = compile_check.cost(compiled, parse_target('v5e:1x1'))
    assert cost['flops'] == pytest.approx(2 * 64 * 64 * 32, rel=0.01)
    memory, time = cost['memory'], cost['estimate']
    assert (memory['arguments'], memory['results']) == (a.nbytes, 64 * 64 * 4)
    assert cost['fits']
    assert not cost['collectives']
    assert time['compute'] == cost['flops'] / CHIPS['v5e'].peak
    assert time['serial'] == time['overlapped'] == max(time['compute'], time['memory'])
    assert time['bound'] == 'memory'
    json.dumps(cost)


@pytest.fixture(scope='session')
def tpu_python():
    """The interpreter of an environment with libtpu, made once and kept in the cache folder."""
    requirements = ROOT / 'requirements-tpu.txt', ROOT / 'requirements-lock.txt'
    folder = cache_folder() / f'tpu-{sys.version_info.major}.{sys.version_info.minor}'
    python = folder / 'bin' / 'python'
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [python, '-m', 'pip', 'install', '-q', '-r', requirements[0], '-c', requirements[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED, reason='libtpu is published for Linux on x86-64 alone')
def test_the_step_is_compiled_for_a_slice_of_eight_chips(tpu_python, tmp_path):
    out = tmp_path / 'found.json'
    command = [tpu_python, '-m', 'launch.compile_check', BASELINE, '--topology=v5e:2x4']
    command += ['--batch_per_chip=8', '--config.model.norm=batch', f'--json={out}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())
    assert (found['batch'], found['batch_per_chip'], found['layout']) == (64, 8, 'data 8')
    assert found['fits']
    assert found['memory']['total'] < CHIPS['v5e'].memory / 100
    assert not found['host_transfers']
    # Statistics are added up where they are: nothing is gathered. What is added up is the gradient,
    # in float32, and little else.
    assert {each['kind'] for each in found['collectives']} == {'all-reduce'}
    net = build(dataclasses.replace(get_config().model, norm='batch'), 10)
    images = jnp.zeros((1, 28, 28, 1))
    parameters = jax.eval_shape(lambda: net.init(jax.random.key(0), images, train=False))['params']
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert gradient <= sum(each['nbytes'] for each in found['collectives']) < 1.05 * gradient
    assert 'estimated step' in done.stdout


@pytest.mark.parametrize(
    ('topology', 'hint'), [('v5e:8', 'v5e:2x4'), ('h100:8', 'v5e, v5p, v6e'), ('', 'v5e:2x4')]
)
def test_a_topology_that_is_none_is_a_mistake(launch, topology, hint):
    done = launch('compile_check', BASELINE, f'--topology={topology}', check=2)
    assert hint in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.skipif('TPU_LIBRARY_PATH' in os.environ, reason='there is a libtpu')
def test_without_libtpu_one_is_told_how_to_get_it(launch):
    done = launch('compile_check', BASELINE, '--topology=v5e:2x4', check=2)
    assert 'requirements-tpu.txt' in done.stderr
