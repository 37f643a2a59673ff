"""Files that appear whole, on the disk, and carry digests; locks that end with their process."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.errors import UserError, reason_of

SEAL = 'seal.json'  # in a sealed folder
SHA256 = 'sha256'  # the key of a JSON file's own digest
DIGEST_BYTES = 32  # at the end of a cached array's file
LEFTOVER_AGE = 24 * 3600  # seconds after which a temporary file has no writer any more


class Corrupt(ValueError):
    """A file or folder is not what was written; the message says in what."""


def cache_folder() -> Path:
    """Return $CNN_JAX_CACHE, else $XDG_CACHE_HOME/cnn_jax, else ~/.cache/cnn_jax.

    A process without a home directory gets a folder that nobody can make: it works without cache.
    """
    chosen = os.environ.get('CNN_JAX_CACHE')
    path = Path(chosen or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'cnn_jax'))
    try:
        return path.expanduser()
    except RuntimeError:
        return Path(os.devnull, 'no home directory, set CNN_JAX_CACHE')


def warn_without_cache(error: OSError) -> None:
    """Say, once in a process, that what is computed is not kept."""
    folder = cache_folder()
    reason = f'{folder}: {error.strerror}'
    if folder.parent == Path(os.devnull):
        reason = 'there is no home directory'
    _warn_once(f'nothing is cached ({reason}); set CNN_JAX_CACHE to a folder that can be written')


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def local_path(given: str, name: str) -> str:
    """A path of this machine with its `~` expanded, or a UserError; a URL stays as it is."""
    if not given.strip():
        raise UserError(f'{name} is empty; give a path')
    if '\0' in given:
        raise UserError(f'{name} is {given!r}; a path holds no zero byte')
    try:
        return str(Path(given).expanduser()) if given.startswith('~') else given
    except RuntimeError as error:
        raise UserError(f'{name} is {given}, and there is no such home; give the path') from error


def workdir_path(given: str | Path, name: str = 'workdir') -> str:
    """The `local_path` of a work directory, or its URL; UserError if nothing can be saved there."""
    if re.search('[\ud800-\udfff]', str(given)):  # bytes in Python
        raise UserError(
            f'{name} is {str(given)!r}, whose name is not UTF-8; checkpoints cannot be saved '
            'there, choose another'
        )
    return local_path(str(given), name)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, each on the disk when this returns."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def make_writable(folder: Path, what: str = 'the work directory', flag: str = '--workdir') -> None:
    """Create a folder, or check that files can be made there; UserError with the flag if not."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'{what} {folder} cannot be written ({os.strerror(error.errno or 0)}); '
            f'choose another {flag}'
        ) from error


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file below a folder by a name that came from elsewhere.

    Errors:
        ValueError: It has empty parts, `.` or `..`, or lies elsewhere once links are resolved.
    """
    path = folder / name
    if not {'', '.', '..'}.isdisjoint(name.split('/')) or (
        not path.resolve().is_relative_to(folder.resolve())
    ):
        raise ValueError(f'{name!r} is not below the folder')
    return path


def sync_all(folder: Path) -> None:
    """`sync` a folder and all that is in it."""
    for path in (folder, *folder.rglob('*')):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some file systems say of folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file that takes the name `path`, whole and on the disk, at the end.

    A reader, a second writer, a crash or a power cut never meets half a file; after an `OSError`,
    which names `path`, it is as it was before. Its mode is 0666 without the umask.
    """
    make_folder(path.parent)
    for leftover in path.parent.glob('.*.partial'):  # of killed writers
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink()
    temporary = path.parent / f'.{secrets.token_hex(8)}.partial'
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # which says nothing to the user
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as `replacing` does."""
    write_bytes(path, text.encode())


def digest(content: bytes | Path) -> str:
    """Return the SHA-256 of bytes, or of a file's content, in hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file; `Corrupt` if it is a pipe or a device."""
    with open(path, 'rb', opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Corrupt('it is not a regular file')
        return file.read()


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file; errors as of `read_bytes`, other bytes are `Corrupt`."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise Corrupt(f'it is not UTF-8 text: {error}') from error


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write a JSON file that carries the digest of its content under the key `sha256`."""
    content = json.loads(json.dumps(content))  # as a reader will find it: lists, texts as keys
    content.pop(SHA256, None)
    sealed = {**content, SHA256: _json_digest(content)}
    write_text(path, json.dumps(sealed, indent=indent) + '\n')


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote: any changed bit is `Corrupt`, or changes nothing."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f'it is not JSON: {error}') from error
    if not isinstance(content, dict) or SHA256 not in content:
        raise Corrupt('it carries no digest, as those of older versions')
    if content.pop(SHA256) != _json_digest(content):
        raise Corrupt('its digest is that of another content')
    return content


def seal_folder(folder: Path, content: dict[str, Any]) -> None:
    """Write `content` (JSON) and the digest of each file into `seal.json`, and sync them all."""
    sync_all(folder)
    write_json(folder / SEAL, {'content': content, 'files': _digests(folder)})


def read_sealed_folder(folder: Path) -> dict[str, Any]:
    """Return the content of a sealed folder; `Corrupt` if a file is missing or has other bytes."""
    try:
        body = read_json(folder / SEAL)
        content, files = body['content'], body['files']
    except FileNotFoundError:
        raise Corrupt(f'{SEAL} is missing') from None
    except (OSError, Corrupt, KeyError) as error:
        raise Corrupt(f'{SEAL} is damaged ({reason_of(error)})') from error
    found = _digests(folder)
    for name, sha256 in files.items():
        if found.get(name) != sha256:
            raise Corrupt(f'{name} is {"damaged" if name in found else "missing"}')
    return content


def stored_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """Return the array that `cached_array` stored, memory-mapped and read-only; None if damaged."""
    if _ends_in_its_digest(path):
        with contextlib.suppress(ValueError, OSError):  # whole, but no such array
            array = np.load(path, mmap_mode='r', allow_pickle=False)
            if array.shape == shape and array.dtype == dtype:
                return array
    return None


def cached_array(
    path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], object], dtype=np.uint8
) -> np.ndarray:
    """Return the array in `path`, memory-mapped and read-only; `fill` and store it if needed.

    The SHA-256 at the end of the file is checked; a damaged file is made again. Where the cache
    cannot be written, the array is built in memory, which `warn_without_cache` says.
    """
    stored = stored_array(path, shape, dtype)
    if stored is not None:
        return stored
    try:
        with replacing(path) as temporary:
            array = np.lib.format.open_memmap(temporary, 'w+', dtype, shape)
            with temporary.open('r+b') as file:
                # A mapped file is sparse: writing to it on a full disk would kill the process.
                if hasattr(os, 'posix_fallocate'):
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            fill(array)
            array.flush()
            with temporary.open('ab') as file:
                file.write(bytes.fromhex(digest(temporary)))
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except OSError as error:
        warn_without_cache(error)
        array = np.empty(shape, dtype)
        fill(array)
        return array


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock `path` while the context lasts; yield whether this succeeded, or wait until so.

    The operating system holds it (flock), so a process that is killed leaves none behind. On a
    shared file system it works across machines where that system's locks do (NFS 4, Lustre, GPFS).
    The file stays. A folder is locked itself, where its file system can.

    Errors:
        UserError: It is a link or a pipe, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _take_lock(path, wait)
    if held is None:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            os.truncate(held, 0)
        os.close(held)


def _take_lock(path: Path, wait: bool) -> int | None:
    """Return the descriptor of a file once it is locked; None if another process has it."""
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if not path.is_dir():
                os.close(descriptor)
                raise UserError(
                    f'{path} cannot be locked ({error.strerror}); use another file system'
                ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the file was removed while this process waited
    with contextlib.suppress(OSError):  # for messages; a full disk must not cost the lock
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps([socket.gethostname(), os.getpid()]).encode())
    return descriptor


def _open_lock(path: Path) -> int:
    """Open the file of a lock: no link, whose target would be emptied, and no pipe."""
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f'{path} is a link; remove it') from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f'{path} is not a regular file; remove it')
    return descriptor


def lock_holder(path: Path) -> tuple[str, int] | None:
    """Return the host and process that hold a lock; a dead one of another machine counts, too."""
    try:
        host, process = json.loads(read_bytes(path))
        process = int(process)
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    try:
        if host == socket.gethostname():
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # another user's process
        pass
    return host, process


def _open_at_once(path: str, flags: int) -> int:
    """An opener that does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _json_digest(content: dict[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def _digests(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.name != SEAL]
    return {path.relative_to(folder).as_posix(): digest(path) for path in paths}


def _ends_in_its_digest(path: Path) -> bool:
    try:
        if not path.is_file():  # to open a pipe could take for ever
            return False
        whole = np.memmap(path, np.uint8, 'r')
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False
    return hashlib.sha256(whole[:-DIGEST_BYTES].data).digest() == whole[-DIGEST_BYTES:].tobytes()
