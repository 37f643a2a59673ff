"""The process: XLA flags, threads, allocator, compilation cache, devices.

Call `configure` before JAX starts. It changes only what is known to help on this platform and
jaxlib version, and leaves what the user has set. Importing this module does not import JAX.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder

# jaxlib 0.10's YNNPACK reductions give wrong results on CPU (jax issue 39103), and its single
# convolutions are about half as fast as Eigen's. Its compiler drops optimization barriers before
# it fuses, by a pass that can be disabled; `cnn_jax.nn` needs them. Later versions do as they are.
YNN_FLAG = 'xla_cpu_experimental_ynn_fusion_type'
PASSES_FLAG = 'xla_disable_hlo_passes'
CPU_FLAGS = {
    (0, 10): {
        YNN_FLAG: f'--{YNN_FLAG}=-reduce,-individual_convolution',
        PASSES_FLAG: f'--{PASSES_FLAG}=cse_barrier_expander',
    }
}

# Without it cuDNN's backward convolutions add in any order, and each start may choose others:
# neither a restart nor next year's run would give the same bits. Its cost was not measured.
GPU_FLAGS = {'xla_gpu_deterministic_ops': '--xla_gpu_deterministic_ops=true'}

# Settings of JAX that change what is computed, and the values with which runs compute.
PINNED = {
    'jax_threefry_partitionable': True,
    'jax_enable_x64': False,
    'jax_default_prng_impl': 'threefry2x32',
    'jax_default_matmul_precision': None,
    'jax_numpy_dtype_promotion': 'standard',
    'jax_numpy_rank_promotion': 'allow',
    'jax_random_seed_offset': 0,
    'jax_enable_custom_prng': False,
    'jax_legacy_prng_key': 'allow',
    'jax_allow_f16_reductions': True,
    'jax_high_dynamic_range_gumbel': False,
    'jax_optimization_level': 'UNKNOWN',
    'jax_exec_time_optimization_effort': 0.0,
    'jax_memory_fitting_effort': 0.0,
    'jax_disable_jit': False,
    'jax_disable_most_optimizations': False,
    'jax_debug_nans': False,
    'jax_debug_infs': False,
}

CUDA_PLUGINS = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
ACCELERATOR_PLUGINS = (*CUDA_PLUGINS, 'jax_rocm7_plugin', 'libtpu')


@dataclass(frozen=True)
class Settings:
    """The settings that `configure` chose."""

    xla_flags: str
    threads: int
    allocator: str
    compile_cache: str

    def __str__(self) -> str:
        """The settings, and what computes convolutions on a CPU, in one line; imports JAX."""
        parallel = count(self.threads, 'thread')
        if self.threads > cores():
            parallel += f' on {count(cores(), "core")}'
        return ' · '.join(
            [
                *(f'jaxlib {jaxlib_version()}', parallel, f'XLA_FLAGS {self.xla_flags or "unset"}'),
                *(f'allocator {self.allocator}', f'compile cache {self.compile_cache}'),
                *map(str, _native()),
            ]
        )


_in_force: Settings | None = None  # what `configure` chose in this process
_NPROC = os.environ.get('NPROC')  # as this process was started


def configure(threads: int = 0) -> Settings:
    """Configure the process for JAX; call once, before JAX is first used.

    XLA's results on a CPU depend on the number of threads of a computation and not on that of the
    cores, so it belongs to a run's record; 0 takes as many as this process may use cores.

    Returns:
        The settings in force: where JAX has started already, those that it started with.
    """
    global _in_force
    if has_started():
        others = 'not set, for JAX had started before cnn_jax was used'
        flags = os.environ.get('XLA_FLAGS', '')
        return _in_force or Settings(flags, _default_threads(), others, others)
    nproc = str(threads) if threads else _NPROC
    if nproc:
        os.environ['NPROC'] = nproc  # read by XLA's CPU client for its thread pools
    else:
        os.environ.pop('NPROC', None)  # an earlier call's
    ours = default_flags(jaxlib_version(), runs_on_cpu())
    given = {*os.environ.get('XLA_FLAGS', '').split()} - {*ours.values()}
    flags = add_xla_flags(ours)
    if given:
        _check_xla_flags()
    allocator = _keep_freed_memory() if runs_on_cpu() else 'the system default'
    _in_force = Settings(flags, _default_threads(), allocator, _set_compile_cache())
    return _in_force


def has_started() -> bool:
    """Return whether JAX has started its devices, after which most settings have no effect."""
    bridge = sys.modules.get('jax._src.xla_bridge')
    return bridge is not None and bridge.backends_are_initialized()


def start_jax() -> None:
    """Start JAX for a run.

    Errors:
        UserError: A setting of JAX is not that with which runs compute, or there is no device of
            the platform that was asked for.
    """
    import jax

    for name, value in PINNED.items():
        # Each version has its own; some are no attributes.
        now = getattr(jax.config, name, jax.config.values.get(name, value))
        if getattr(now, 'value', now) != value:
            raise UserError(
                f'{name} is {now} in this process, with which a run would compute other numbers; '
                f'call jax.config.update({name!r}, {value!r}) first'
            )
    _guard_compile_cache()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get('JAX_PLATFORMS', '')
        told = str(error).partition(' (set JAX')[0] or 'there is no such device'
        raise UserError(f'JAX cannot start with JAX_PLATFORMS={asked}: {told}') from error


def forget_settings() -> list[str]:
    """Take the pinned settings out of the environment, before JAX reads it; return their names."""
    given = [name.upper() for name in PINNED if name.upper() in os.environ]
    for name in given:
        del os.environ[name]
    return given


def _default_threads() -> int:
    """The threads that NPROC names, else one for each core."""
    given = os.environ.get('NPROC') or str(cores())
    if not given.isdecimal() or not int(given):
        raise UserError(f'NPROC is {given!r} in the environment; it must be a whole number from 1')
    return int(given)


def _native() -> list[Any]:
    """The library of native convolutions, on a CPU; builds it if need be. Imports JAX."""
    return [importlib.import_module('cnn_jax.nn.native').library()] if runs_on_cpu() else []


def cores() -> int:
    """The number of cores that this process may use: its own, or a container's quota of them."""
    if not hasattr(os, 'sched_getaffinity'):
        return os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no quota, or none that cgroups v2 tell
        quota, period = map(int, Path('/sys/fs/cgroup/cpu.max').read_text('ascii').split())
        mine = min(mine, max(1, math.ceil(quota / period)))
    return mine


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 core`, `2 cores`."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def jaxlib_version() -> str:
    """The installed jaxlib's version, read without importing it."""
    return importlib.metadata.version('jaxlib')


def runs_on_cpu() -> bool:
    """Return whether JAX will choose the CPU, without starting JAX."""
    chosen = os.environ.get('JAX_PLATFORMS', '')
    if chosen:
        return chosen.split(',')[0] == 'cpu'
    return not any(importlib.util.find_spec(name) for name in ACCELERATOR_PLUGINS)


def default_flags(version: str, on_cpu: bool) -> dict[str, str]:
    """The XLA flags that a jaxlib version needs, by their names."""
    if on_cpu:
        major, minor = version.split('.')[:2]
        return CPU_FLAGS.get((int(major), int(minor)), {})
    return GPU_FLAGS if any(map(importlib.util.find_spec, CUDA_PLUGINS)) else {}


def add_xla_flags(wanted: dict[str, str]) -> str:
    """Add flags to XLA_FLAGS unless the user has set them; returns the variable's new value."""
    flags = os.environ.get('XLA_FLAGS', '')
    added = [flag for name, flag in wanted.items() if name not in flags]
    if added:
        flags = os.environ['XLA_FLAGS'] = ' '.join([flags, *added]).strip()
    return flags


def _check_xla_flags() -> None:
    """Refuse XLA_FLAGS that XLA does not take: it would end this process, as it does a child."""
    command = [sys.executable, '-c', 'from jaxlib import _jax; _jax.CompileOptions()']
    told = subprocess.run(command, capture_output=True, text=True, errors='replace').stderr
    if found := re.search(r"(Unknown flag|Couldn't interpret|Could not open file)[^\n]*", told):
        raise UserError(f'XLA does not take the XLA_FLAGS of the environment: {found[0]}')


def _keep_freed_memory() -> str:
    """Make glibc keep freed blocks; otherwise every step maps its large temporaries anew.

    Page faults cost a quarter of a step on CPU. One arena, since another one's 64 MB heaps go back
    to the system whole, whatever the thresholds. Source: mallopt(3).
    """
    preloaded = os.environ.get('LD_PRELOAD', '')
    if 'tcmalloc' in preloaded or 'jemalloc' in preloaded:
        return 'preloaded by the user'
    if platform.libc_ver()[0] != 'glibc':
        return 'the system default'
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    wanted = {m_arena_max: 1, m_mmap_max: 0, m_trim_threshold: 2**31 - 1, m_top_pad: 256 << 20}
    done = [libc.mallopt(*each) for each in wanted.items()]
    return 'glibc, freed memory kept' if all(done) else 'glibc default (mallopt refused)'


def _set_compile_cache() -> str:
    """Point JAX's persistent compilation cache at a folder of this jaxlib and processor.

    Whoever may write there may run code, so that it is this user's alone.
    """
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = _own_cache() / f'jaxlib-{jaxlib_version()}-{processor()}'
        try:
            folder.parent.parent.mkdir(parents=True, exist_ok=True)
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            whose = [each.lstat() for each in (folder.parent, folder)]
        except OSError:
            return 'off (its folder is not writable)'
        if any(each.st_uid != os.getuid() or each.st_mode & 0o022 for each in whose):
            return f'off (others can write to {folder})'
        os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
        os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
        if 'jax' in sys.modules:  # it has read the environment
            import jax

            least = float(os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'])
            jax.config.update('jax_compilation_cache_dir', str(folder))
            jax.config.update('jax_persistent_cache_min_compile_time_secs', least)
    return os.environ['JAX_COMPILATION_CACHE_DIR']


def _own_cache() -> Path:
    return cache_folder() / f'compiled-{os.getuid()}'


def _guard_compile_cache() -> None:
    """Let each entry of the compile cache end in its SHA-256; one that does not is made anew.

    JAX takes what it can decompress for what it wrote, and never replaces what it cannot read.
    """
    own = _own_cache()
    if own not in Path(os.environ.get('JAX_COMPILATION_CACHE_DIR', '')).parents:
        return  # it is the user's, who may use it without this package
    try:
        from jax._src.lru_cache import LRUCache

        get, put = LRUCache.get, LRUCache.put
    except (ImportError, AttributeError):  # a JAX with another cache
        return

    @functools.wraps(get)
    def checked_get(self: Any, key: str) -> bytes | None:
        entry = get(self, key)
        if entry is None or hashlib.sha256(entry[:-32]).digest() == entry[-32:]:
            return None if entry is None else entry[:-32]
        with contextlib.suppress(OSError):
            Path(self.path, f'{key}-cache').unlink()
        return None

    @functools.wraps(put)
    def sealed_put(self: Any, key: str, value: bytes) -> None:
        put(self, key, value + hashlib.sha256(value).digest())

    if not hasattr(get, '__wrapped__'):  # once a process
        LRUCache.get, LRUCache.put = checked_get, sealed_put


def processor() -> str:
    """A short digest of the processor: code compiled for another one may not run here."""
    text, fields = platform.processor() + platform.machine(), 'model name|flags|Features|CPU part'
    with contextlib.suppress(OSError):
        first = Path('/proc/cpuinfo').read_text(errors='replace').split('\n\n')[0]
        text += ''.join(line for line in first.splitlines() if re.match(fields, line))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def devices() -> str:
    """The devices that JAX uses: `1 × NVIDIA H100` or `1 × cpu`. Starts JAX."""
    import jax

    kinds = [d.device_kind for d in jax.devices()]
    return ', '.join(f'{kinds.count(kind)} × {kind}' for kind in sorted(set(kinds)))


def memory() -> int:
    """The bytes that all devices of all processes have, alike in each process. Starts JAX."""
    import jax

    limits = [(each.memory_stats() or {}).get('bytes_limit', 0) for each in jax.local_devices()]
    here = sum(limits) or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return here * jax.process_count()


def machine(settings: Settings) -> dict[str, Any]:
    """The machine for a run's record: devices, interpreter and settings. Starts JAX."""
    python = f'{platform.python_implementation()} {sys.version.split()[0]}'
    convolutions = ''.join(library.key for library in _native()) or 'XLA'
    return {
        **{'devices': devices(), 'python': python, 'convolutions': convolutions},
        **vars(settings),
    }
