"""VGG16's weights with everything that must stay with them."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn_jax.errors import UserError
from cnn_jax.pretrained import cache
from cnn_jax.pretrained.fetch import fetch
from cnn_jax.pretrained.layout import CONVOLUTIONS, Params, digest
from cnn_jax.pretrained.preprocessing import CAFFE, PREPROCESSINGS, TORCH, Preprocessing
from cnn_jax.pretrained.read import read
from cnn_jax.pretrained.sources import IMAGENET, SOURCES, Source, Weights

# What a layout's publishers train with.
_LAYOUTS = {'keras': CAFFE, 'torch': TORCH}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights, inseparable from the preprocessing that they were trained with."""

    params: Params  # {'block1_conv1': {'kernel': float32 [3, 3, 3, 64], 'bias': …}, …}, read-only
    preprocessing: Preprocessing
    digest: str
    source: str
    licence: str
    citation: str
    ignored: tuple[str, ...] = ()  # tensors of the file that are not VGG16's, such as a head


@dataclass(frozen=True)
class Attempt:
    """What became of one place: `error` is empty where the weights were found."""

    name: str
    error: str


def load(
    source: str | Path = 'auto',
    *,
    preprocessing: Preprocessing | str | None = None,
    include_top: bool = False,
    sources: Sequence[Source] = SOURCES,
) -> Pretrained:
    """VGG16's weights, verified.

    Args:
        source: 'auto' (the cache, then each of `sources` until one delivers), the name of one of
            `sources` (fetched again), or a weights file.
        preprocessing: For a file of one's own whose layout does not tell it, or tells it wrongly.
            Published weights have theirs, and no other is accepted.
        include_top: Also the fully connected layers; only from a file.
        sources: Where published weights are looked for.

    Errors:
        UserError: Nowhere to be had (all that was tried is named), not VGG16, or the
            preprocessing is unknown or contradicts what the weights were trained with.
    """
    chosen = _preprocessing(preprocessing)
    if isinstance(source, str) and source in ('auto', *(s.name for s in sources)):
        if include_top:
            raise UserError(
                'no published source here has the fully connected layers; give a file, such as '
                "Keras's vgg16_weights_tf_dim_ordering_tf_kernels.h5"
            )
        found, _ = published(source, sources)
        _check_preprocessing(chosen, found.preprocessing, source)
        return found
    return from_file(Path(source), chosen, include_top)


def published(
    source: str = 'auto', sources: Sequence[Source] = SOURCES
) -> tuple[Pretrained, tuple[Attempt, ...]]:
    """The published weights, and what was tried to get them; they are in the cache afterwards.

    Args:
        source: As in `load`, but no file.
        sources: As in `load`.
    """
    attempts: list[Attempt] = []
    if source == 'auto':
        try:
            params, origin = cache.load(IMAGENET)
            return _as_published(params, IMAGENET, origin), (Attempt('cache', ''),)
        except UserError as error:
            attempts.append(Attempt('cache', str(error)))
            if cache.path(IMAGENET).exists():
                log.warning('%s; fetching the weights again', error)
    for candidate in sources:
        if source not in ('auto', candidate.name):
            continue
        try:
            found = _fetch(candidate)
        except UserError as error:
            log.warning('%s: %s', candidate.name, error)
            attempts.append(Attempt(candidate.name, str(error)))
            continue
        cache.save(found.params, candidate.weights, candidate.name)
        return found, (*attempts, Attempt(candidate.name, ''))
    tried = '; '.join(f'{a.name}: {a.error}' for a in attempts)
    raise UserError(
        f'the weights of {IMAGENET.name} could not be had from anywhere ({tried}); give a file '
        'that you have, or fetch them where the network allows it and copy the cache'
    )


def from_file(
    path: Path, preprocessing: Preprocessing | None = None, include_top: bool = False
) -> Pretrained:
    """The weights in a file of one's own, published or not.

    Published weights are recognized by their digest, whatever the file. Of others, the digest is
    reported, and the preprocessing is the file's own word, or the one given, or its layout's habit.

    Args:
        path: Of a kind that `cnn_jax.pretrained.read.read` knows.
        preprocessing: As in `load`.
        include_top: As in `load`.
    """
    params, contents, ignored = read(path, include_top)
    params, weights = _recognized(params)
    if weights:
        _check_preprocessing(preprocessing, weights.preprocessing, path)
        return _as_published(params, weights, str(path), ignored)
    metadata = contents.metadata
    if stated := _preprocessing(metadata.get('preprocessing') or None):
        _check_preprocessing(preprocessing, stated, path)
    preprocessing = preprocessing or stated or _LAYOUTS.get(contents.layout)
    if not preprocessing:
        raise UserError(
            f'{path} does not tell which preprocessing its weights were trained with; save '
            f'them as safetensors with the metadata preprocessing, {" or ".join(PREPROCESSINGS)}'
        )
    return Pretrained(
        params,
        preprocessing,
        digest(params),
        str(path),
        metadata.get('licence', 'not known: ask whoever trained them'),
        metadata.get('citation', ''),
        ignored,
    )


def _recognized(params: Params) -> tuple[Params, Weights | None]:
    """The parameters in canonical channel order, and what they are if they are published.

    torchvision's IMAGENET1K_FEATURES are Oxford's convolutions with the first one's inputs in
    RGB order. Its names are those of weights trained with mean and standard deviation, so that
    only the values can tell.
    """
    first = params['block1_conv1']
    kernel = np.ascontiguousarray(first['kernel'][:, :, ::-1])
    kernel.flags.writeable = False
    swapped = {**params, 'block1_conv1': {**first, 'kernel': kernel}}
    for candidate in (params, swapped):
        convolutions = {layer: candidate[layer] for layer in CONVOLUTIONS}
        if digest(convolutions) == IMAGENET.digest:
            return candidate, IMAGENET
    return params, None


def _as_published(
    params: Params, weights: Weights, source: str, ignored: tuple[str, ...] = ()
) -> Pretrained:
    return Pretrained(
        params,
        weights.preprocessing,
        digest(params),
        source,
        weights.licence,
        weights.citation,
        ignored,
    )


def _fetch(source: Source) -> Pretrained:
    try:
        with tempfile.TemporaryDirectory(prefix='cnn_jax-') as folder:
            params, _, ignored = read(fetch(source, Path(folder)))
    except OSError as error:
        raise UserError(
            f'{tempfile.gettempdir()} cannot hold the download: {error.strerror}; make room, or '
            'set TMPDIR to another folder'
        ) from error
    if (found := digest(params)) != source.weights.digest:
        raise UserError(
            f'the file holds other weights: their digest is {found} and not '
            f'{source.weights.digest}; take another source'
        )
    return _as_published(params, source.weights, source.name, ignored)


def _preprocessing(given: Preprocessing | str | None) -> Preprocessing | None:
    if not isinstance(given, str):
        return given
    if given not in PREPROCESSINGS:
        raise UserError(
            f'there is no preprocessing {given!r}; it can be {", ".join(PREPROCESSINGS)}'
        )
    return PREPROCESSINGS[given]


def _check_preprocessing(
    given: Preprocessing | None, right: Preprocessing, source: str | Path
) -> None:
    if given not in (None, right):
        raise UserError(
            f'the weights of {source} were trained with preprocessing {right.name}, not '
            f'{given.name}; leave preprocessing out'
        )
