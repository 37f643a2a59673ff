"""The work directory of a run: what lies where, and whose it is."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.cache import write_atomically
from cnn_jax.errors import UserError


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


def claim(folder: Path, config: cfg.Config) -> None:
    """Create the work directory, or check that it belongs to a run of the same config.

    Errors:
        UserError: It cannot be written, or holds an ablation, or a run of another config (the
            difference is told).
    """
    make_writable(folder)
    if (folder / 'ablation.json').exists():
        raise UserError(f'{folder} holds an ablation; choose another --workdir')
    path = folder / 'config.json'
    if not path.exists():
        write_text(path, cfg.to_json(config))
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


def check_data(folder: Path, description: dict[str, Any]) -> None:
    """Check that a run that is continued still has the data it began with.

    Args:
        folder: The work directory.
        description: Of the data as they are now, as `setup.describe` gives it.

    Errors:
        UserError: The images, the labels or their order have changed.
    """
    path = folder / 'manifest.json'
    if not path.exists():
        return
    before = json.loads(path.read_text())['data']
    for split in ('train', 'eval'):
        if before[split] != description[split]:
            raise UserError(
                f'the {split} images of {description["source"]} have changed since the run in '
                f'{folder} began ({before[split]["count"]} images then, '
                f'{description[split]["count"]} now); restore them or choose another --workdir'
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


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole."""
    write_atomically(path, lambda file: file.write(text.encode()))
