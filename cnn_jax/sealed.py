"""JSON that carries its own digest, so that not one changed digit goes unnoticed."""

import hashlib
import json
from typing import Any

KEY = 'sha256'


def dumps(content: dict[str, Any]) -> str:
    """One line of JSON with, under `sha256`, the digest of all the rest."""
    return json.dumps({**content, KEY: _digest(content)}) + '\n'


def loads(text: str) -> dict[str, Any]:
    """The content that `dumps` wrote; one without a digest is taken as it is.

    Errors:
        ValueError: It is not JSON, not an object, or not what was written.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    if not isinstance(content, dict):
        raise ValueError('it is not an object')
    if KEY in content and content.pop(KEY) != _digest(content):
        raise ValueError('its digest is that of another content')
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
