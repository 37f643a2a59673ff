"""The work directory of a run: what lies where, and whose it is."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.files import lock, lock_holder, write_text


def make_writable(folder: Path, what: str = 'the work directory', flag: str = '--workdir') -> None:
    """Create a folder, or check that files can be made in the one that is there.

    Args:
        folder: The folder.
        what: What it is, for the error.
        flag: The flag that names it, for the error.

    Errors:
        UserError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'{what} {folder} cannot be written ({os.strerror(error.errno or 0)}); '
            f'choose another {flag}'
        ) from error


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[None]:
    """Have the work directory to oneself, for as long as the context lasts.

    Args:
        folder: The work directory; created if missing.
        wait: For another process that has it, instead of giving up.

    Errors:
        UserError: It cannot be written, or another process has it.
    """
    make_writable(folder)
    path = folder / 'lock'
    if wait and (other := lock_holder(path)):
        print(f'waiting for process {other[1]} on {other[0]}, which trains in {folder}', flush=True)
    with lock(path, wait) as mine:
        if not mine:
            host, process = lock_holder(path) or ('another machine', '?')
            raise UserError(
                f'process {process} on {host} is training in {folder}; give --wait to go on after '
                'it, or choose another --workdir'
            )
        yield


def claim(folder: Path, config: cfg.Config) -> None:
    """Make the work directory that of a run, or check that it belongs to one of the same config.

    What ended before its first step, by a mistake in the command for one, does not count as a run.

    Errors:
        UserError: It holds an ablation, or a run of another config (the difference is told).
    """
    if (folder / 'ablation.json').exists():
        raise UserError(f'{folder} holds an ablation; choose another --workdir')
    if not any((folder / name).exists() for name in ('manifest.json', 'checkpoints')):
        write_text(folder / 'config.json', cfg.to_json(config))
        return
    changed = cfg.differences(load_config(folder), config)
    if changed:
        listed = '; '.join(
            f'config.{name}: {old!r} → {new!r}' for name, (old, new) in changed.items()
        )
        raise UserError(
            f'the work directory {folder} belongs to a run of another config ({listed}); '
            'choose another --workdir or restore these fields'
        )


def load_config(folder: Path) -> cfg.Config:
    """The config of the run in a work directory.

    Errors:
        UserError: The folder is missing or holds no run.
    """
    path = folder / 'config.json'
    if not path.exists():
        raise UserError(
            f'{folder} is not the work directory of a run (it has no config.json); '
            'give the --workdir that launch.train was given'
        )
    return cfg.from_json(path.read_text())
