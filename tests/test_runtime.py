"""Runtime settings: applied where they help, the user's respected."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cnn_jax import runtime
from cnn_jax.errors import UserError

CLEAN = ('XLA_FLAGS', 'NPROC', 'JAX_COMPILATION_CACHE_DIR', 'CNN_JAX_CACHE', 'JAX_PLATFORMS')


@pytest.fixture
def settings(tmp_path):
    """The settings that `prepare` makes in a fresh process, and that process's environment."""

    def make(threads=0, code='', **environment):
        clean = {name: text for name, text in os.environ.items() if name not in CLEAN}
        script = (
            'import json, os\n'
            'from cnn_jax import runtime\n'
            f'settings = runtime.configure({threads})\n'
            f'{code}\n'
            'print(json.dumps([vars(settings), dict(os.environ)]))'
        )
        done = subprocess.run(
            [sys.executable, '-c', script],
            env=clean | {'CNN_JAX_CACHE': str(tmp_path)} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return make


def test_flags_are_set_for_the_versions_that_need_them(monkeypatch):
    old = ' '.join(runtime.CPU_FLAGS[0, 10].values())
    for version, expected in (('0.10.2', old), ('0.11.0', ''), ('1.0', '')):
        monkeypatch.delenv('XLA_FLAGS', raising=False)
        assert runtime.add_xla_flags(runtime.default_flags(version, on_cpu=True)) == expected


def test_the_users_flags_are_kept_and_their_choice_wins(monkeypatch):
    wanted = runtime.default_flags('0.10.2', on_cpu=True)
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=false')
    assert runtime.add_xla_flags(wanted).startswith('--xla_cpu_enable_fast_math=false --xla_cpu')
    own = f'--{runtime.YNN_FLAG}=-dot --{runtime.PASSES_FLAG}=algsimp'
    monkeypatch.setenv('XLA_FLAGS', own)
    assert runtime.add_xla_flags(wanted) == own


def test_an_nvidia_gpu_adds_in_a_fixed_order(monkeypatch):
    monkeypatch.setattr(runtime, 'CUDA_PLUGINS', ('json',))  # a module that is there
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    flags = runtime.add_xla_flags(runtime.default_flags('0.10.2', on_cpu=False))
    assert flags == '--xla_gpu_deterministic_ops=true'


def test_freed_memory_stays_whichever_thread_freed_it(settings):
    """60 MB that a thread of XLA's takes and gives back: in the end, without page faults."""
    code = (
        'import jax, jax.numpy as jnp, resource\n'
        'f = jax.jit(lambda x: jnp.cumsum(jnp.concatenate([x, -x, x + 1])).sum())\n'
        'x = jnp.ones(5_000_000)\n'
        'def faults():\n'
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    f(x).block_until_ready()\n'
        '    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n'
        'assert any(faults() < 1000 for _ in range(40))'
    )
    settings(code=code)


def test_an_accelerator_leaves_the_cpu_settings_alone(settings):
    made, environment = settings(JAX_PLATFORMS='cuda')
    assert made['allocator'] == 'the system default'
    assert 'XLA_FLAGS' not in environment


def test_threads_are_what_was_asked_for(settings):
    made, environment = settings(threads=1)
    assert (made['threads'], environment['NPROC']) == (1, '1')


@pytest.mark.parametrize('given', [{}, {'NPROC': '2'}])
def test_a_later_call_that_asks_for_none_has_the_users(settings, given):
    _, environment = settings(threads=1, code='settings = runtime.configure()', **given)
    assert environment.get('NPROC') == given.get('NPROC')


def test_bits_depend_on_the_threads_and_not_on_the_cores(settings):
    """So that a run can be gone on with on a machine with fewer cores."""
    code = (
        'import hashlib, jax, jax.numpy as jnp, numpy as np\n'
        'cores = sorted(os.sched_getaffinity(0))\n'
        'os.sched_setaffinity(0, cores[: int(os.environ["CORES"])])\n'
        'x = jax.random.normal(jax.random.key(0), (32, 28, 28, 16))\n'
        'k = jax.random.normal(jax.random.key(1), (3, 3, 16, 32))\n'
        'f = jax.grad(lambda k: (jax.lax.conv(x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1),'
        ' (1, 1), "SAME") ** 2).mean())\n'
        'bits = np.asarray(jax.jit(f)(k)).tobytes()\n'
        'os.environ["BITS"] = hashlib.sha256(bits).hexdigest()'
    )
    bits = {
        (threads, cores): settings(threads, code, CORES=cores)[1]['BITS']
        for threads in (1, 2)
        for cores in '12'
    }
    assert bits[1, '1'] == bits[1, '2']
    assert bits[2, '1'] == bits[2, '2']


def test_the_compile_cache_is_used_and_can_be_chosen(settings, tmp_path):
    code = 'import jax; jax.jit(lambda x: x + 1, compiler_options={})(1.0)'
    made, _ = settings(code=code, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
    assert made['compile_cache'].startswith(str(tmp_path))
    assert os.listdir(made['compile_cache'])
    made, _ = settings(JAX_COMPILATION_CACHE_DIR='/elsewhere')
    assert made['compile_cache'] == '/elsewhere'


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ('--nope', 'Unknown flag.* --nope'),
        (' --xla_cpu_enable_fast_math=false --xla_nope=3', 'Unknown flag.* --xla_nope'),
        ('--xla_force_host_platform_device_count=x', 'value x for flag xla_force_host'),
        ('xla_cpu_enable_fast_math=false', 'not start with'),
        ('/etc/hosts', 'not start with'),
    ],
)
def test_flags_that_end_the_process_are_refused_before(monkeypatch, flags, words):
    monkeypatch.setattr(runtime, 'has_started', lambda: False)
    monkeypatch.setenv('XLA_FLAGS', flags)
    with pytest.raises(UserError, match=words) as raised:
        runtime.configure()
    assert '\n' not in str(raised.value)


OTHERS = {
    'jax_default_prng_impl': 'rbg',
    'jax_default_matmul_precision': 'bfloat16',
    'jax_numpy_dtype_promotion': 'strict',
    'jax_numpy_rank_promotion': 'raise',
    'jax_random_seed_offset': 3,
    'jax_legacy_prng_key': 'error',
    'jax_optimization_level': 'O1',
    'jax_exec_time_optimization_effort': 0.5,
    'jax_memory_fitting_effort': 0.5,
}


def test_a_launcher_forgets_the_settings_that_change_numbers(settings):
    """Each set otherwise, in words or in nonsense: JAX starts as if none were."""
    for others in (OTHERS, dict.fromkeys(runtime.PINNED, 'nonsense')):
        given = {
            name.upper(): str(others.get(name, int(not value)))
            for name, value in runtime.PINNED.items()
        }
        code = 'print(runtime.forget_settings()); import jax; runtime.start_jax()'
        _, environment = settings(code=code, **given)
        assert not environment.keys() & given.keys()


@pytest.mark.parametrize('name', runtime.PINNED)
def test_a_run_refuses_settings_that_change_numbers(name):
    assert name in jax.config.values
    jax.config.update(name, OTHERS.get(name, not runtime.PINNED[name]))
    try:
        with pytest.raises(UserError, match=name):
            runtime.start_jax()
    finally:
        jax.config.update(name, runtime.PINNED[name])
    runtime.start_jax()


@pytest.mark.parametrize('platforms', ['cuda', 'banana'])
def test_a_platform_that_is_not_there_is_named(settings, platforms):
    code = (
        'try: runtime.start_jax()\n'
        'except Exception as error: os.environ["TOLD"] = f"{type(error).__name__}: {error}"'
    )
    _, environment = settings(code=code, JAX_PLATFORMS=platforms)
    assert environment['TOLD'].startswith('UserError: JAX cannot start with JAX_PLATFORMS=')
    assert not environment['TOLD'].endswith(': ')


@pytest.mark.parametrize('given', ['auto', '0', '-1', '1.5'])
def test_threads_that_are_no_number_are_named(monkeypatch, given):
    monkeypatch.setenv('NPROC', given)
    with pytest.raises(UserError, match='NPROC'):
        runtime._default_threads()


PROGRAMS = """
import warnings
warnings.simplefilter('error')
runtime.start_jax()
import jax
for number in range(6):
    jax.jit(lambda x: x * 2 + number)(3.0)
"""


def test_damaged_entries_of_the_compile_cache_are_made_again_without_a_word(settings):
    def run():
        made, _ = settings(code=PROGRAMS, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
        return Path(made['compile_cache'])

    def is_whole(path):
        content = path.read_bytes()
        return hashlib.sha256(content[:-32]).digest() == content[-32:]

    folder = run()
    assert [p.stat().st_mode & 0o777 for p in (folder, folder.parent)] == [0o700, 0o700]
    entries = sorted(folder.glob('*-cache'))
    assert len(entries) >= 6
    assert all(map(is_whole, entries))
    for number, path in enumerate(entries):
        content = path.read_bytes()
        flipped = bytes([*content[:40], content[40] ^ 1, *content[41:]])
        path.write_bytes([flipped, content[: len(content) // 2], b'', b'junk' * 99][number % 4])
    run()
    assert sorted(folder.glob('*-cache')) == entries
    assert all(map(is_whole, entries))
    folder.chmod(0o777)
    assert 'others can write' in settings()[0]['compile_cache']
