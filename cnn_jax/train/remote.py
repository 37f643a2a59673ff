"""A work directory in an object store: `--workdir=gs://bucket/run`.

A run needs locks, renames and files that grow, which object stores lack. So it works in a folder
of this machine, which is copied to the remote one after every checkpoint; at the start the remote
one is copied here if its newest whole checkpoint is farther than the local one's. Wherever an
upload breaks off, the remote folder holds a checkpoint to resume from: the seal of a new one goes
last, and after that that of an old one is removed first (stores replace a file whole or not at
all). Nothing locks the remote folder: who starts last owns it, and another process that still
trains there ends at its next checkpoint.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cnn_jax.errors import RunFailed, UserError, reason_of
from cnn_jax.files import SEAL, Corrupt, cache_folder, digest, inside, lock, read_sealed_folder

CONFIG = 'config.json'
WRITER = 'writer.json'  # who trains there; remote only
CHECKPOINT = re.compile(r'checkpoints/step_(\d+)/.+')


def is_remote(workdir: str) -> bool:
    """Return whether a --workdir is the URL of a remote folder."""
    return '://' in workdir


def fetch_workdir(workdir: str) -> Path:
    """Return the folder of a --workdir, to read a run from; a remote one is copied."""
    if not is_remote(workdir):
        return Path(workdir).expanduser()
    mirror = Mirror(workdir, 'read')  # apart from the folder that a run may be at
    with lock(mirror.base / 'lock', wait=True), mirror.explained():
        names = mirror.names()
        if CONFIG not in names:
            raise UserError(f'there is no run at {workdir}; give the --workdir of launch.train')
        mirror.download(names)
    return mirror.folder


def upload(workdir: str, names: Iterable[str]) -> None:
    """Copy files that were written into the folder from `fetch_workdir` to a remote --workdir."""
    if is_remote(workdir):
        mirror = Mirror(workdir, 'read')
        with mirror.explained():
            mirror.put(names)


class Mirror:
    """A remote work directory and the local folder that stands for it.

    The URL is fsspec's: gs:// (gcsfs), s3:// (s3fs), memory://, file://. Different uses have
    different local folders: `folder`, in `base`, which whoever uses it must lock. What any method
    cannot do is a `UserError`, and so is a folder that holds anything but a run of its own; an
    outage is a `RunFailed`.
    """

    def __init__(self, url: str, use: str = 'train'):
        self.url = url.rstrip('/')
        with self.explained():
            self._fs, self._root = _open(self.url)
        name = re.sub(r'[^\w.-]+', '_', self.url.rpartition('/')[2])
        self.base = cache_folder() / 'workdirs' / f'{name}-{digest(self.url.encode())[:12]}-{use}'
        self.folder = self.base / 'run'
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files that are there
        self._broken: set[int] = set()  # steps of checkpoints there that are not what was sealed
        self._me = {'host': socket.gethostname(), 'process': os.getpid(), 'token': uuid.uuid4().hex}

    def resume(self, say: Callable[[str], object] = print) -> None:
        """Copy the remote folder here if it is farther; else check that it holds the same run."""
        with self.explained():
            names = self.names()
            here, there = _newest_whole(self.folder), max(_sealed(names), default=-1)
            if (here < 0 or there > here) and self.download(names, here):
                return
            common = max((step for step in _sealed(names) if step <= here), default=None)
            theirs = f'checkpoints/step_{common}/steps.f32'  # 8 bytes of each step so far
            if theirs in names:
                mine = (self.folder / f'checkpoints/step_{here}/steps.f32').read_bytes()
                if not mine.startswith(self._fs.cat_file(self._path(theirs))):
                    raise UserError(
                        f'{self.folder} and {self.url} hold different runs; remove one of them'
                    )
            if there < here:
                say(f'resuming from {self.folder}, which is farther than {self.url}')

    def take(self) -> None:
        """Become the owner of the remote folder."""
        with self.explained():
            self._fs.pipe_file(self._path(WRITER), json.dumps(self._me).encode())

    def push(self, last: bool = False) -> None:
        """Upload what is new or changed, and remove old checkpoints.

        Its `last` call raises an error as `RunFailed`; others print it: the next makes up for it.
        """
        try:
            self._push()
        except RunFailed:
            raise
        except Exception as error:
            what = f'{self.url} cannot be written ({reason_of(error)}); it is all in {self.folder}'
            if last:
                raise RunFailed(f'{what}; rerun the same command here to upload it') from error
            print(f'warning: {what}; the next checkpoint tries again', file=sys.stderr)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what the store's file system raises, which may be of any type, as a `UserError`.

        An outage is a `RunFailed`: who restarts failed runs is to try again.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if _passes(error):
                raise RunFailed(
                    f'{self.url} cannot be reached ({reason_of(error)}); rerun the same command'
                ) from error
            raise UserError(
                f'{self.url} cannot be used ({reason_of(error)}); check the name of the bucket, '
                'the network, and that your credentials allow reading and writing (gs://: gcloud '
                'auth application-default login)'
            ) from error

    def put(self, names: Iterable[str]) -> None:
        """Copy files of the local folder to the remote one."""
        if names := list(names):
            self._fs.put([str(self.folder / name) for name in names], [*map(self._path, names)])

    def names(self) -> list[str]:
        """The names of the remote files; one that would be written elsewhere is refused."""
        paths = [path for path in self._fs.find(self._root) if not path.endswith('/')]
        names = [path.removeprefix(self._path('')) for path in paths]
        for name in names:
            try:
                inside(self.folder, name)
            except ValueError as error:
                raise UserError(f'{self.url} holds a file named {name!r}; remove it') from error
        if names and CONFIG not in names and WRITER not in names:
            raise UserError(f'{self.url} holds other files and no run; choose another --workdir')
        return names

    def download(self, names: list[str], here: int = -1) -> bool:
        """Put a copy of the remote folder in the local one's place, if it proves to be farther."""
        incoming, plain = self.base / 'incoming', [name for name in names if _is_plain(name)]
        shutil.rmtree(incoming, ignore_errors=True)
        for step in _sealed(names):
            own, new = (folder / f'checkpoints/step_{step}' for folder in (self.folder, incoming))
            seal = self._path(f'checkpoints/step_{step}/{SEAL}')
            with contextlib.suppress(FileNotFoundError):  # the run has removed it meanwhile
                if _is_whole(own) and (own / SEAL).read_bytes() == self._fs.cat_file(seal):
                    shutil.copytree(own, new)
                else:
                    self._get([name for name in names if _step(name) == step], incoming)
            if not _is_whole(new):
                shutil.rmtree(new, ignore_errors=True)
                self._broken.add(step)
        self._get(plain, incoming)
        if not plain or 0 <= here >= _newest_whole(incoming):
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        incoming.rename(self.folder)
        return True

    def _get(self, names: list[str], folder: Path) -> None:
        if names:
            self._fs.get([*map(self._path, names)], [str(inside(folder, name)) for name in names])

    def _path(self, name: str) -> str:
        return f'{self._root}/{name}'

    def _push(self) -> None:
        writer = json.loads(self._fs.cat_file(self._path(WRITER)))
        if writer != self._me:
            raise RunFailed(
                f'process {writer["process"]} on {writer["host"]} has begun to train in '
                f'{self.url}, which ends this one; what it had not uploaded is in {self.folder}'
            )
        there, here = self.names(), _files(self.folder)
        facts = {name: (self.folder / name).stat() for name in filter(_is_plain, here)}
        files = {name: (fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}
        self.put(name for name in files if self._sent.get(name) != files[name])
        self._sent = files
        steps = _sealed(here)
        # A whole checkpoint there of the same run and step is as good, whatever its bytes.
        for step in sorted(steps - (_sealed(there) - self._broken), reverse=True):
            self._remove(step, there)
            seal = f'checkpoints/step_{step}/{SEAL}'
            self.put(name for name in here if _step(name) == step and name != seal)
            self.put([seal])
            self._broken.discard(step)
        for step in {_step(name) for name in there} - steps - {None}:
            self._remove(step, there)

    def _remove(self, step: int | None, names: list[str]) -> None:
        """Remove what is there of a checkpoint, the seal before all else."""
        mine = [name for name in names if _step(name) == step]
        for name in sorted(mine, key=lambda name: not name.endswith(f'/{SEAL}')):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))


def _open(url: str) -> tuple[Any, str]:
    """The file system and the path of a URL."""
    import fsspec.core

    options = {'auto_mkdir': True} if url.startswith('file:') else {}
    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise UserError(
            f'{url} needs a package ({reason_of(error)}); install it (for gs://: pip install -r '
            'requirements-gcs.txt)'
        ) from error
    return fs, root.rstrip('/')


def _passes(error: Exception) -> bool:
    """Return whether the network or the store's server failed, and not what was asked of it."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return (
        network
        or type(error).__module__.startswith('aiohttp')
        or str(getattr(error, 'code', '')).startswith('5')  # of gcsfs's errors, the HTTP status
    )


def _step(name: str) -> int | None:
    """The step of the checkpoint that a file belongs to."""
    match = CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def _sealed(names: Iterable[str]) -> set[int]:
    """The steps of the checkpoints that are there with their seals."""
    return {step for name in names if name.endswith(f'/{SEAL}') if (step := _step(name))}


def _is_plain(name: str) -> bool:
    """Return whether a file is mirrored by itself: of no checkpoint, no lock, not temporary."""
    first, *_ = parts = name.split('/')
    return first not in ('checkpoints', 'lock', WRITER) and not any(p[:1] == '.' for p in parts)


def _files(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(read_sealed_folder(checkpoint))
    except Corrupt:
        return False


def _newest_whole(folder: Path) -> int:
    """The step of the newest whole checkpoint in a local work directory; -1 without any."""
    steps = _sealed(_files(folder))
    return max((s for s in steps if _is_whole(folder / f'checkpoints/step_{s}')), default=-1)
