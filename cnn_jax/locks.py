"""A lock that ends with its process, however that ends."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now holds the lock `path`, for as long as the context lasts.

    The operating system holds it (flock), so a process that is killed leaves none behind. On a
    shared file system it works across machines where that system's locks do (NFS 4, Lustre, GPFS).

    Args:
        path: The lock's file; created, and never removed.
        wait: Until the one who has it lets it go.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab', buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        with suppress(OSError):  # the name is for messages; a full disk must not cost the lock
            file.truncate(0)
            file.write(json.dumps([socket.gethostname(), os.getpid()]).encode())
        try:
            yield True
        finally:
            file.truncate(0)


def holder(path: Path) -> tuple[str, int] | None:
    """Host and process that hold a lock, as far as can be seen from here.

    A process of another machine that died counts until the lock is taken again.
    """
    try:
        host, process = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if host == socket.gethostname() and not _lives(process):
        return None
    return host, process


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
