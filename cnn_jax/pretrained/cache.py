"""The local copy of published weights: whole or absent, and never trusted unread."""

from pathlib import Path
from typing import BinaryIO

from cnn_jax.cache import cache_folder, write_atomically
from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained.layout import Params, digest
from cnn_jax.pretrained.read import read
from cnn_jax.pretrained.sources import Weights


def path(weights: Weights) -> Path:
    """Where the weights are kept, named by their digest."""
    return cache_folder() / f'vgg16-{weights.digest[:16]}.safetensors'


def save(params: Params, weights: Weights, source: str) -> Path:
    """Keep a copy as safetensors, visible only when it is complete and on the disk.

    Args:
        params: Those of `weights`.
        weights: What they are; preprocessing, licence and citation go into the file.
        source: Where they came from.

    Errors:
        UserError: The folder cannot be written, or the disk is full.
    """
    from safetensors.numpy import save as to_bytes

    metadata = {
        'name': weights.name,
        'source': source,
        'digest': weights.digest,
        'preprocessing': weights.preprocessing.name,
        'licence': weights.licence,
        'citation': weights.citation,
    }
    where = path(weights)
    content = to_bytes(flatten(params), metadata)

    def write(file: BinaryIO) -> None:
        file.write(content)

    try:
        write_atomically(where, write)
    except OSError as error:
        raise UserError(
            f'{where} cannot be written: {error.strerror}; make room, or set CNN_JAX_CACHE to '
            'another folder'
        ) from error
    return where


def load(weights: Weights) -> tuple[Params, str]:
    """The parameters kept, verified by digest, and the source that they came from.

    Errors:
        UserError: There is no copy, or it is damaged.
    """
    where = path(weights)
    if not where.exists():
        raise UserError(f'{where} is not there; fetch it')
    params, contents, ignored = read(where)
    if ignored:
        raise UserError(f'{where} holds foreign tensors ({", ".join(ignored)}); delete it')
    if digest(params) != weights.digest:
        raise UserError(f'{where} is damaged: its digest is not {weights.digest}; delete it')
    return params, str(contents.metadata.get('source', 'unknown'))
