"""Environments of the suite's own, for packages that are not to be beside the project's."""

import functools
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
