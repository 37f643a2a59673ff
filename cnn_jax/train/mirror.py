"""A work directory in an object store: `--workdir=gs://bucket/run`.

A run needs locks, renames and files that grow, which object stores do not have. So it works in a
folder of this machine, which is copied to the remote one after every checkpoint. At the start the
remote one is brought here if its newest whole checkpoint is farther than the local one's.

A checkpoint's seal is uploaded after all that it vouches for, and removed before it: half of one
is never taken for a whole one. Nothing locks the remote folder: who starts last owns it, and
another process that still trains there ends at its next checkpoint.

By fsspec, with whatever it has a file system for: gs:// (gcsfs), s3:// (s3fs), memory://, file://.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

from cnn_jax import locks
from cnn_jax.cache import cache_folder
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.train import seal

LOCK = 'lock'  # of the local folder
WRITER = 'writer.json'  # who trains there; remote only
CONFIG = 'config.json'
INCOMING = '.incoming'  # a download that goes on
STEP = re.compile(r'step_(\d+)')
MISTAKES = re.compile(r'credential|forbidden|denied|anonymous|does not exist|invalid bucket', re.I)


def is_remote(workdir: str) -> bool:
    """Whether a --workdir is the URL of a remote folder."""
    return '://' in workdir


def opened(workdir: str) -> Path:
    """The local folder of a --workdir to read from; of a URL, brought here first.

    Errors:
        UserError: There is no run at the URL, or it cannot be read.
    """
    if not is_remote(workdir):
        return Path(workdir)
    mirror = Mirror(workdir)
    with locks.locked(mirror.folder / LOCK) as mine:
        if mine:  # else a run here is at it, and this is as new as it gets
            mirror.fetch()
    if not (mirror.folder / CONFIG).exists():
        raise UserError(f'there is no run at {workdir}; give the --workdir that launch.train had')
    return mirror.folder


def upload(workdir: str, *paths: Path) -> None:
    """Copy files that were written into the folder that `opened` gave to where it came from.

    Errors:
        RunFailed: They cannot be uploaded; they are kept locally.
    """
    if is_remote(workdir):
        Mirror(workdir).upload(*paths)


class Mirror:
    """A remote work directory and the local folder that stands for it.

    Args:
        url: Of the remote folder.
        folder: The local one; by default one in the cache, the same for the same URL.

    Attributes:
        url, folder: As above.
    """

    def __init__(self, url: str, folder: Path | None = None):
        self.url = url.rstrip('/')
        self.folder = folder or _folder(self.url)
        # What the remote folder is known to hold: of each file, size and time of what was copied,
        # or None if its content has to be replaced or removed.
        self._there: dict[str, tuple[int, int] | None] = {}
        self._me = {'host': socket.gethostname(), 'process': os.getpid(), 'token': uuid.uuid4().hex}

    def begin(self) -> None:
        """`fetch`, then take the remote folder for this process; which must hold the local one.

        Errors:
            UserError: There is no such bucket, or it cannot be written, or it holds other files.
            RunFailed: It cannot be reached.
        """
        self.fetch()
        with self._explained():
            self._fs.pipe_file(self._remote(WRITER), json.dumps(self._me).encode())

    def fetch(self) -> None:
        """Make the local folder what the remote one is, unless the local one is as far or farther.

        Errors: As `begin`.
        """
        with self._explained():
            sizes = self._listing()
        if sizes and CONFIG not in sizes:
            raise UserError(f'{self.url} holds other files and no run; choose another --workdir')
        sealed_there = [step for name in sizes if (step := _seals(name)) is not None]
        here, there = _newest_whole(self.folder), max(sealed_there, default=-1)
        fetched = False
        if sizes and (here < 0 or there > here):
            fetched = self._replace(sizes, sealed_there, here)
        self._there = {name: None for name in sizes if name.startswith('checkpoints/')}
        known = _files(self.folder)
        if fetched:
            self._there |= {name: known[name] for name in known if name in sizes}
            return
        for step in sealed_there:
            self._there |= self._same(step, sizes, known)
        if here >= 0 and here > there:
            print(
                f'{self.folder} is at step {here} and {self.url} is not: going on from the former '
                '(remove it to start anew)'
            )

    def push(self) -> None:
        """Upload what is new or changed, and remove what is gone; a failure is told, not raised.

        Errors:
            RunFailed: Another process has taken the remote folder.
        """
        try:
            self._push()
        except RunFailed:
            raise
        except Exception as error:
            print(
                f'warning: {self.url} cannot be written ({_reason(error)}): tried again at the '
                f'next checkpoint; everything is in {self.folder}',
                file=sys.stderr,
            )

    def finish(self) -> None:
        """`push` at the end of a run.

        Errors:
            RunFailed: It failed.
        """
        with self._kept():
            self._push()

    def upload(self, *paths: Path) -> None:
        """Upload some files of the local folder.

        Errors:
            RunFailed: It failed.
        """
        with self._kept():
            self._put([path.relative_to(self.folder).as_posix() for path in paths])

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the path of the remote folder in it."""
        try:
            import fsspec.core

            options = {'auto_mkdir': True} if self.url.startswith('file:') else {}
            fs, root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            scheme = self.url.partition(':')[0]
            how = '-r requirements-gcs.txt' if scheme in ('gs', 'gcs') else 'what it names'
            raise UserError(
                f'{self.url} needs a package that is not installed ({_reason(error)}); '
                f'pip install {how}'
            ) from error
        except ValueError as error:
            raise UserError(
                f'--workdir={self.url}: {_reason(error)}; use gs://BUCKET/FOLDER'
            ) from error
        return fs, root.rstrip('/')

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    def _remote(self, name: str) -> str:
        return f'{self._opened[1]}/{name}'

    def _listing(self) -> dict[str, int]:
        """The files in the remote folder, and their sizes."""
        self._fs.invalidate_cache()
        start = self._remote('')
        found = self._fs.find(start.rstrip('/'), detail=True)
        sizes = {
            name.removeprefix(start): info['size']
            for name, info in found.items()
            if info['type'] == 'file' and name.startswith(start) and not name.endswith('/')
        }
        return {name: size for name, size in sizes.items() if not _left_out(name)}

    def _replace(self, sizes: dict[str, int], sealed_there: list[int], here: int) -> bool:
        """Put the remote files in the place of the local ones, if they prove to be farther."""
        incoming = self.folder / INCOMING
        shutil.rmtree(incoming, ignore_errors=True)
        names = [name for name in sizes if _step(name) in (None, *sealed_there)]
        places = [incoming / name for name in names]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._fs.get([self._remote(name) for name in names], [str(place) for place in places])
        farther = here < 0 or _newest_whole(incoming) > here
        if farther:  # the remote ones stay where they are until all of this is done
            for old in self.folder.iterdir():
                if old.name not in (LOCK, INCOMING):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            for new in incoming.iterdir():
                new.rename(self.folder / new.name)
        shutil.rmtree(incoming)
        return farther

    def _same(
        self, step: int, sizes: dict[str, int], known: dict[str, tuple[int, int]]
    ) -> dict[str, tuple[int, int]]:
        """The files of a checkpoint if it is the same one in both folders."""
        files = {name: seen for name, seen in known.items() if _step(name) == step}
        name = f'checkpoints/step_{step}/{seal.NAME}'
        if name not in files or any(sizes.get(each) != files[each][0] for each in files):
            return {}
        with self._explained():
            same = self._fs.cat_file(self._remote(name)) == (self.folder / name).read_bytes()
        return files if same else {}

    def _push(self) -> None:
        self._check_writer()
        here = _files(self.folder)
        changed = [name for name in here if self._there.get(name) != here[name]]
        # A folder without a config is not taken for a run's, and the record must reach as far as
        # the checkpoints do.
        for group in _in_order(changed):
            self._put(group)
            self._there |= {name: here[name] for name in group}
        gone = [name for name in self._there if name not in here]
        for group in reversed(_in_order(gone)):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm([self._remote(name) for name in group])
            for name in group:
                del self._there[name]

    def _put(self, names: list[str]) -> None:
        self._fs.put(
            [str(self.folder / name) for name in names], [self._remote(name) for name in names]
        )

    def _check_writer(self) -> None:
        """Find out that another process has begun to train in the same remote folder."""
        self._fs.invalidate_cache()
        try:
            writer = json.loads(self._fs.cat_file(self._remote(WRITER)))
        except FileNotFoundError:  # somebody has emptied it
            self._there.clear()
            self._fs.pipe_file(self._remote(WRITER), json.dumps(self._me).encode())
            return
        if writer != self._me:
            raise RunFailed(
                f'process {writer["process"]} on {writer["host"]} has begun to train in '
                f'{self.url}, which ends this one; what it had not uploaded is in {self.folder}'
            )

    @contextlib.contextmanager
    def _explained(self):
        """Say in a sentence why the remote folder cannot be used."""
        try:
            yield
        except (UserError, RunFailed):
            raise
        except Exception as error:
            mistake = isinstance(error, (FileNotFoundError, PermissionError))
            if mistake or MISTAKES.search(str(error)):
                raise UserError(
                    f'{self.url} cannot be used ({_reason(error)}); check that the bucket exists '
                    'and that your credentials may write to it (for gs://, gcloud auth '
                    'application-default login)'
                ) from error
            raise RunFailed(
                f'{self.url} cannot be reached ({_reason(error)}); the same command tries again'
            ) from error

    @contextlib.contextmanager
    def _kept(self):
        """Say where everything is if it cannot be uploaded."""
        try:
            yield
        except RunFailed:
            raise
        except Exception as error:
            raise RunFailed(
                f'{self.url} cannot be written ({_reason(error)}); everything is kept in '
                f'{self.folder}, and the same command on this machine uploads it'
            ) from error


def _folder(url: str) -> Path:
    """The folder in the cache that stands for a URL."""
    name = re.sub(r'[^\w.-]+', '_', url.rpartition('/')[2])
    return cache_folder() / 'workdirs' / f'{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}'


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a local work directory that are mirrored: size, and time of the last change."""
    found = {}
    for path in folder.rglob('*'):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _left_out(name):
            facts = path.stat()
            found[name] = facts.st_size, facts.st_mtime_ns
    return found


def _left_out(name: str) -> bool:
    """Whether a file is not part of the run: the lock, and what is not finished."""
    first, *rest = name.split('/')
    if first in (LOCK, WRITER) or first.startswith('.') or '..' in rest:
        return True
    return first == 'checkpoints' and _step(name) is None


def _step(name: str) -> int | None:
    """The step of the checkpoint that a file belongs to."""
    parts = name.split('/')
    if len(parts) < 3 or parts[0] != 'checkpoints' or not (found := STEP.fullmatch(parts[1])):
        return None
    return int(found[1])


def _seals(name: str) -> int | None:
    """The step of the checkpoint whose seal a file is."""
    return _step(name) if name.split('/')[2:] == [seal.NAME] else None


def _in_order(names: list[str]) -> list[list[str]]:
    """Files in the order in which they may appear: the config, the rest, the seals; none empty."""
    seals = [name for name in names if _seals(name) is not None]
    rest = [name for name in names if name != CONFIG and name not in seals]
    return [group for group in ([CONFIG] * (CONFIG in names), rest, seals) if group]


def _newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint in a work directory that is whole; -1 without any."""
    steps = [
        int(found[1])
        for path in folder.glob('checkpoints/*')
        if (found := STEP.fullmatch(path.name))
    ]
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(seal.Broken):
            seal.opened(folder / 'checkpoints' / f'step_{step}')
            return step
    return -1


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
