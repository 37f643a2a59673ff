"""A work directory in an object store: `--workdir=gs://bucket/run`.

A run needs locks, renames and files that grow, which object stores do not have. So it works in a
folder of this machine, which is copied to the remote one after every checkpoint. At the start the
remote one is copied here if its newest whole checkpoint is farther than the local one's.

Wherever an upload breaks off, the remote folder holds a checkpoint to go on from: the record goes
before the checkpoint, whose seal comes last; of an old one the seal is removed first. This relies
on object stores' way of replacing a file whole or not at all.

Nothing locks the remote folder. Who starts last owns it: another process that still trains there
ends at its next checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

from cnn_jax.errors import RunFailed, UserError
from cnn_jax.files import SEAL, Corrupt, cache_folder, lock, read_sealed_folder
from cnn_jax.train.journal import Journal
from cnn_jax.train.remote import Remote, reason

CONFIG = 'config.json'
WRITER = 'writer.json'  # who trains there; remote only
STEP = re.compile(r'checkpoints/step_(\d+)/.+')

Seals = dict[int, bytes | None]  # of checkpoints, by step; None for one that is not finished


def is_remote(workdir: str) -> bool:
    """Whether a --workdir is the URL of a remote folder."""
    return '://' in workdir


def opened(workdir: str) -> Path:
    """The folder of a --workdir, to read a run from: of a URL, what is there now, copied here.

    Errors:
        UserError: There is no run at the URL, or it cannot be read.
    """
    if not is_remote(workdir):
        return Path(workdir)
    mirror = Mirror(workdir, 'read')  # apart from the folder that a run may be at
    with lock(mirror.base / 'lock', wait=True):
        mirror.fetch()
    return mirror.folder


def upload(workdir: str, names: Iterable[str]) -> None:
    """Copy files that were written into the folder from `opened` to where that came from.

    Errors:
        UserError: They cannot be written there.
    """
    if is_remote(workdir):
        mirror = Mirror(workdir, 'read')
        with mirror.remote.explained():
            mirror.remote.put(names, mirror.folder)


class Mirror:
    """A remote work directory and the local folder that stands for it.

    Args:
        url: Of the remote folder.
        use: Different uses have different local folders.

    Attributes:
        remote: The remote folder.
        base: In the cache, the same for the same URL and use; to be locked by whoever uses it.
        folder: The local work directory, in `base`.

    Errors:
        UserError: A package is missing, or the URL or the credentials are wrong.
    """

    def __init__(self, url: str, use: str = 'train'):
        self.remote = Remote(url)
        self.url = self.remote.url
        name = re.sub(r'[^\w.-]+', '_', self.url.rpartition('/')[2])
        digest = hashlib.sha256(self.url.encode()).hexdigest()
        self.base = cache_folder() / 'workdirs' / f'{name}-{digest[:12]}-{use}'
        self.folder = self.base / 'run'
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files that are there
        self._there: Seals = {}  # of the checkpoints that are there
        self._me = {'host': socket.gethostname(), 'process': os.getpid(), 'token': uuid.uuid4().hex}

    def fetch(self) -> None:
        """Make the local folder what the remote one is.

        Errors:
            UserError: It cannot be read, or holds no run.
        """
        with self.remote.explained():
            names, seals = self._look()
            if CONFIG not in names:
                raise UserError(
                    f'there is no run at {self.url}; give the --workdir that launch.train had'
                )
            self._replace(names, seals, here=-1)

    def resume(self) -> None:
        """`fetch` if the remote folder is farther; else find out what to upload.

        Errors:
            UserError: It cannot be read, or holds other files or another run.
        """
        with self.remote.explained():
            names, self._there = self._look()
            finished = [step for step, content in self._there.items() if content]
            here, there = _newest_whole(self.folder), max(finished, default=-1)
            farther = here < 0 or there > here
            if not farther or not self._replace(names, self._there, here):
                common = [step for step in finished if step <= here]
                if common and not self._goes_on_from(max(common)):
                    raise UserError(
                        f'{self.folder} and {self.url} hold different runs; remove one of them'
                    )
                if there < here:
                    print(f'going on from {self.folder}, which is farther than {self.url}')
            # A checkpoint of the same run and step is as good as the local one, whatever its bytes.
            mine = _seals(self.folder)
            self._there |= {step: mine[step] for step in finished if step in mine}

    def take(self) -> None:
        """Own the remote folder.

        Errors:
            UserError: It cannot be written.
        """
        with self.remote.explained():
            self.remote.write(WRITER, json.dumps(self._me).encode())

    def push(self, last: bool = False) -> None:
        """Upload what is new or changed, and remove old checkpoints.

        Args:
            last: An error is raised; else it is told, and the next call makes up for it.

        Errors:
            RunFailed: The last one failed, or another process has taken the remote folder.
        """
        try:
            self._push()
        except RunFailed:
            raise
        except Exception as error:
            told = f'{self.url} cannot be written ({reason(error)}); all is kept in {self.folder}'
            if last:
                raise RunFailed(f'{told}, and the same command here uploads it') from error
            print(f'warning: {told}; the next checkpoint tries again', file=sys.stderr)

    def _look(self) -> tuple[list[str], Seals]:
        """The names of the remote files, and the checkpoints' seals."""
        names = self.remote.names()
        if names and CONFIG not in names and WRITER not in names:
            raise UserError(f'{self.url} holds other files and no run; choose another --workdir')
        seals = dict.fromkeys(step for name in names if (step := _step(name)) is not None)
        for step in seals:
            with contextlib.suppress(FileNotFoundError):
                seals[step] = self.remote.read(_name(step, SEAL))
        return names, seals

    def _replace(self, names: list[str], seals: Seals, here: int) -> bool:
        """Put a copy of the remote folder in the local one's place, if it proves to be farther."""
        incoming, mine = self.base / 'incoming', _seals(self.folder)
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        for step in [step for step, content in seals.items() if content]:
            own, new = self.folder / _name(step), incoming / _name(step)
            if mine.get(step) == seals[step] and _is_whole(own):
                shutil.copytree(own, new)
                continue
            try:
                self.remote.get([name for name in names if _step(name) == step], incoming)
            except FileNotFoundError:  # the run has removed it meanwhile
                shutil.rmtree(new, ignore_errors=True)
        plain = [name for name in names if _is_plain(name)]
        self.remote.get(plain, incoming)  # now, so that the record reaches as far as they do
        if not plain or 0 <= here >= _newest_whole(incoming):
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        incoming.rename(self.folder)
        return True

    def _goes_on_from(self, step: int) -> bool:
        """Whether the local record goes on from that of a remote checkpoint."""
        content = json.loads(self._there[step] or b'')['content']
        positions = content['progress']['record']
        return all(Journal(self.folder / name).holds(at) for name, at in positions.items())

    def _push(self) -> None:
        writer = json.loads(self.remote.read(WRITER))
        if writer != self._me:
            raise RunFailed(
                f'process {writer["process"]} on {writer["host"]} has begun to train in '
                f'{self.url}, which ends this one; what it had not uploaded is in {self.folder}'
            )
        files, here = _plain(self.folder), _seals(self.folder)
        changed = [name for name in files if self._sent.get(name) != files[name]]
        self.remote.put(changed, self.folder)
        self._sent = files
        for step in sorted(here, reverse=True):
            if self._there.get(step) != here[step]:
                self._remove(step)
                self._there[step] = None  # some of it is there, from now on
                last = _name(step, SEAL)
                others = [name for name in _files(self.folder, _name(step)) if name != last]
                self.remote.put(others, self.folder)
                self.remote.put([last], self.folder)
                self._there[step] = here[step]
        for step in self._there.keys() - here.keys():
            self._remove(step)

    def _remove(self, step: int) -> None:
        """Remove what is there of a checkpoint, the seal before all else."""
        if self._there.get(step):
            self.remote.remove(_name(step, SEAL))
            self._there[step] = None
        if step in self._there:
            self.remote.remove(_name(step))
            del self._there[step]


def _name(step: int, file: str = '') -> str:
    return f'checkpoints/step_{step}/{file}'.rstrip('/')


def _step(name: str) -> int | None:
    """The step of the checkpoint that a file belongs to."""
    match = STEP.fullmatch(name)
    return int(match[1]) if match and '..' not in name.split('/') else None


def _is_plain(name: str) -> bool:
    """Whether a file is mirrored by itself: no checkpoint's, no lock, none that is being made."""
    first, *_ = parts = name.split('/')
    return first not in ('checkpoints', 'lock', WRITER) and not any(p[:1] == '.' for p in parts)


def _files(folder: Path, under: str = '') -> list[str]:
    paths = [path for path in (folder / under).rglob('*') if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def _plain(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a work directory besides the checkpoints: size, and time of the last change."""
    facts = {name: (folder / name).stat() for name in _files(folder) if _is_plain(name)}
    return {name: (fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}


def _seals(folder: Path) -> dict[int, bytes]:
    """The seals of the checkpoints in a work directory, by step."""
    paths = folder.glob(f'checkpoints/step_*/{SEAL}')
    found = {path.parent.name.removeprefix('step_'): path for path in paths}
    return {int(step): path.read_bytes() for step, path in found.items() if step.isdigit()}


def _is_whole(checkpoint: Path) -> bool:
    with contextlib.suppress(Corrupt):
        read_sealed_folder(checkpoint)
        return True
    return False


def _newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint in a work directory that is whole; -1 without any."""
    steps = sorted(_seals(folder), reverse=True)
    return next((step for step in steps if _is_whole(folder / _name(step))), -1)
