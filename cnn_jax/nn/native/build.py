"""The native library's build: compiled where it is first needed, checked, and kept.

CNN_JAX_NATIVE=0 switches the library off, =1 (as unset) keeps it in the user's cache folder, a path
is the folder to keep it in. Its name is a digest of all that its machine code depends on. Whatever
goes wrong is a reason to do without it, told in `Library.reason` and remembered.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder, lock, replacing, write_text

SOURCES = Path(__file__).parent
SWITCH = 'CNN_JAX_NATIVE'
FLAGS = ('-std=c++17', '-O3', '-fPIC', '-shared', '-pthread', '-w')
CHECK_SECONDS = 120  # some 3 are needed
AGAIN = 'python -m cnn_jax.nn.native tries again'


@dataclass(frozen=True)
class Library:
    """The library's file, or the reason why there is none."""

    path: Path | None
    key: str = ''
    reason: str = ''

    def __str__(self) -> str:
        if self.path:
            return f'native convolutions {self.key}'
        return f"XLA's convolutions ({self.reason})"


@functools.cache
def library() -> Library:
    """Find the library of this machine, or build it; every process gets the same one."""
    return find()


def find(again: bool = False) -> Library:
    """Find or build the library; `again` what has failed before.

    Errors:
        UserError: CNN_JAX_NATIVE is neither 0 nor 1 nor a path.
    """
    chosen = os.environ.get(SWITCH) or '1'
    if chosen == '0':
        return Library(None, reason=f'{SWITCH}=0')
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'c++', 'clang++']
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return Library(None, reason='no C++ compiler: install g++, or set CXX')
    if chosen != '1' and os.sep not in chosen:
        raise UserError(f'{SWITCH} is {chosen!r}; set it to 0, 1 or the path of a folder')
    folder = cache_folder() / 'native' if chosen == '1' else Path(chosen).expanduser().absolute()
    try:
        return _kept(compiler, folder, again)
    except OSError as error:
        return Library(None, reason=f'the native library cannot be kept: {error}')


def _kept(compiler: str, folder: Path, again: bool) -> Library:
    is_arm = platform.machine() in ('arm64', 'aarch64')
    flags = (*FLAGS, '-mcpu=native' if is_arm else '-march=native')
    key = _key(compiler, flags)
    built, failed = folder / f'{key}.so', folder / f'{key}.failed'
    if not built.exists():
        with lock(folder / 'lock', wait=True):  # of several processes one builds
            if again:
                failed.unlink(missing_ok=True)
            if failed.exists():
                return Library(None, reason=failed.read_text('utf-8'))
            if not built.exists() and (reason := _build(compiler, flags, built)):
                write_text(failed, f'{reason}; {AGAIN}')
                return Library(None, reason=failed.read_text('utf-8'))
    return Library(built, key)


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> str:
    """Compile and check the library; returns the reason why it cannot be used, if so."""
    print('building the native convolutions, once …', file=sys.stderr, flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        command = [compiler, *flags, f'-I{include()}', str(SOURCES / 'ffi.cc'), '-o', str(new)]
        done = subprocess.run(command, capture_output=True, text=True, errors='replace')
        if done.returncode:
            return f'the native library does not compile: {_last_line(done.stderr)}'
        if reason := check(new):
            return reason
        with replacing(path) as temporary:
            shutil.copyfile(new, temporary)
    print(f'built in {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)
    return ''


def check(path: Path, seconds: float = CHECK_SECONDS) -> str:
    """Compare the library with NumPy in a child process; returns what is wrong with it, or ''."""
    command = [sys.executable, str(SOURCES / 'check.py'), str(path)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors='replace',
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f'the check of the native library did not end in {seconds:.0f} s'
    how = _last_line(done.stderr) or f'exit {done.returncode}'
    return f'the native library fails its check ({how})' if done.returncode else ''


def include() -> Path:
    """The folder of XLA's headers, found without importing JAX."""
    spec = importlib.util.find_spec('jaxlib')
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / 'include'


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    from cnn_jax.runtime import processor

    command = [compiler, '--version']
    version = subprocess.run(command, capture_output=True, text=True, errors='replace').stdout
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in ('.cc', '.h'))
    texts = [path.read_text('utf-8') for path in (*sources, SOURCES / 'check.py')]
    facts = [*texts, *flags, version, importlib.metadata.version('jaxlib'), processor()]
    return hashlib.sha256('\0'.join(facts).encode()).hexdigest()[:16]


def _last_line(text: str) -> str:
    """The line that says what went wrong: the first error of a compiler, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if 'error:' in line), lines[-1] if lines else '')
