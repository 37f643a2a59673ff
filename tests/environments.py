"""Processes unlike the suite's: with packages that are not beside the project's; more devices."""

import functools
import os
import subprocess
import sys
import venv
from pathlib import Path

from cnn_jax.files import cache_folder

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def environment(name: str, requirements: str, *options: str) -> Path:
    """The Python of an environment with these requirements, made once and kept in the cache."""
    folder = cache_folder() / f'{name}-{sys.version_info.major}.{sys.version_info.minor}'
    python = folder / 'bin' / 'python'
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [python, '-m', 'pip', 'install', '-q', '-r', requirements, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def on_devices(count: int, code: str, *arguments: str) -> str:
    """What a program prints in a process of so many CPU devices, in which it must not fail."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={count}'
    done = subprocess.run(
        [sys.executable, '-c', code, *arguments],
        env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
