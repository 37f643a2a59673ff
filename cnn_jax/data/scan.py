"""Reading every encoded image of a set once: sizes, channels, and which cannot be read.

What is learnt here makes a streamed set and a decoded one the same: both leave out the same
images, and both know their number and sizes before the first batch.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cnn_jax.cache import cache_folder
from cnn_jax.data import cache
from cnn_jax.data.decode import RULE, CorruptImage, examine
from cnn_jax.errors import UserError


class Finding(NamedTuple):
    """What `scan` learnt of one image; `reason` is '' for a readable one."""

    height: int
    width: int
    channels: int
    reason: str
    sha256: str  # of the encoded bytes


def scan(data: bytes) -> Finding:
    """The finding of one encoded image."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return Finding(*examine(data), '', sha256)
    except CorruptImage as error:
        return Finding(0, 0, 0, str(error), sha256)


def skipped(
    name: str, paths: Sequence[str], findings: Sequence[Finding], max_corrupt: float
) -> tuple[tuple[str, str], ...]:
    """The `(path, reason)` of each unreadable image.

    Raises `UserError`, with the first of them, where they are more than the share `max_corrupt`.
    """
    wrong = [(path, found.reason) for path, found in zip(paths, findings) if found.reason]
    if wrong and len(wrong) / len(paths) > max_corrupt:
        first = '; '.join(f'{path}: {reason}' for path, reason in wrong[:3])
        raise UserError(
            f'{len(wrong)} of the {len(paths)} images of {name} cannot be read ({first}); '
            f'replace or remove them, or raise --config.data.max_corrupt from {max_corrupt:g}'
        )
    return tuple(wrong)


def remembered(key: str) -> list[Any]:
    """The rows stored under `key` by the present rule of decoding, or none."""
    content = cache.read_bytes(_location(key))
    stored = json.loads(content or '{}')
    return stored['rows'] if stored.get('rule') == RULE else []


def remember(key: str, rows: Sequence[Any]) -> None:
    """Store rows of JSON values under `key`."""
    content = json.dumps({'rule': RULE, 'rows': rows}, separators=(',', ':'))
    cache.write_bytes(_location(key), content.encode())


def _location(key: str) -> Path:
    return cache_folder() / 'index' / f'{key}.json'
