"""A folder with a digest of every file in it: whole, or found not to be."""

import hashlib
from pathlib import Path
from typing import Any

from cnn_jax import sealed
from cnn_jax.train.workdir import write_text

NAME = 'seal.json'


class Broken(ValueError):
    """A folder is not what was sealed; the message says why."""


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write the digests of a folder's files, and `content` (JSON), into it."""
    write_text(folder / NAME, sealed.dumps({'content': content, 'files': _digests(folder)}))


def opened(folder: Path) -> dict[str, Any]:
    """The content of a sealed folder.

    Errors:
        Broken: The folder was not sealed, or a file is missing or has other bytes.
    """
    try:
        body = sealed.loads((folder / NAME).read_text())
        content, files = body['content'], body['files']
    except FileNotFoundError:
        raise Broken('it has no seal: an older version wrote it') from None
    except (OSError, ValueError, KeyError):
        raise Broken(f'{NAME} is damaged') from None
    found = _digests(folder)
    for name, sha256 in files.items():
        if name not in found:
            raise Broken(f'{name} is missing')
        if found[name] != sha256:
            raise Broken(f'{name} is damaged')
    return content


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and path.name != NAME:
            with path.open('rb') as file:
                digest = hashlib.file_digest(file, 'sha256')
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found
