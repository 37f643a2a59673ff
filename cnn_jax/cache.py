"""Where the project keeps what can be made again, and how a file gets there whole."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """$CNN_JAX_CACHE, else $XDG_CACHE_HOME/cnn_jax, else ~/.cache/cnn_jax."""
    chosen = os.environ.get('CNN_JAX_CACHE')
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base).expanduser() / 'cnn_jax'


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears under `path` complete or not at all.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the
    name in one step, so that a reader, a second writer or a crash never meets half a file.

    Args:
        path: The final name; an existing file is replaced. Its folder is created.
        write: Receives the open binary file.

    Errors:
        OSError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # that of a full disk does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
