"""Cached features: outputs of a frozen backbone, computed once, on which the head is trained.

Features are stored in the user's cache folder (`cnn_jax.store`), each under a digest of what its
image is decoded of. The folder's name is a digest of everything else that features depend on. So
nothing stale can be read, all splits share what they have in common, and a further image costs one.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from cnn_jax import config as cfg
from cnn_jax import params, rng, runtime
from cnn_jax.backbones import BACKBONES
from cnn_jax.data import decode
from cnn_jax.data.augment import augment_and_normalize
from cnn_jax.data.batches import Batches, put
from cnn_jax.data.source import digest
from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder
from cnn_jax.mesh import Layout
from cnn_jax.models import Classifier, build
from cnn_jax.nn import native
from cnn_jax.nn.cpu import on_cpu
from cnn_jax.nn.winograd import transform_kernels, winograd_interceptor
from cnn_jax.store import Rows, Store

PIXELS_PER_BATCH = 400_000  # on a CPU: eight images of 224×224, which stay in its caches
PIXELS_PER_BATCH_ON_ACCELERATORS = 20 * PIXELS_PER_BATCH
ARITHMETIC = 4  # increment it when the backbone computes other bits: old files are then unused
PER_FILE = 256  # examples in a file: what a kill can lose, some seconds of work
BYTES_PER_FILE = 2**25  # of it, where features are large
LARGEST = 4  # features for each number of an image: VGG16's from block2_pool on

# In memory, and in a file: .npy has no bfloat16, so its bits are stored.
DTYPES = {'float32': (np.float32, np.float32), 'bfloat16': (ml_dtypes.bfloat16, np.uint16)}


def cached_cut(
    config: cfg.Config,
    network: nn.Module,
    input_shape: tuple[int, ...],
    trainable: Iterable[str],
    need_images: Sequence[str] = (),
) -> str:
    """Return the layer whose cached features a phase takes in place of images; '' for none.

    It is the last before all that is trained.

    Args:
        config, network: Those of the run.
        input_shape: Height, width and channels of a prepared image. Of a backbone that is trained
            in part, only features of at most `LARGEST` times its numbers are worth their room.
        trainable: Paths of the parameters that the phase trains.
        need_images: The fields of the regularizers that are on and need images.

    Errors:
        UserError: config.features.cache is `always`, but the features change from step to step.
    """
    mode, augment, reason = config.features.cache, config.augment, ''
    trained = [name for name in trainable if name.startswith('backbone/')]
    known = isinstance(network, Classifier) and config.model.name in BACKBONES
    layers = network.frozen_layers(trained) if known else []
    cut = layers[-1] if layers else ''
    if not known:
        reason = f'config.model.name is {config.model.name}, which has no backbone'
    elif not cut:
        reason = 'the backbone is trained (config.train.frozen lacks backbone/*)'
    elif mode == 'auto' and trained and _size_at(config, cut, input_shape) > LARGEST:
        reason = f'the features of {cut} are large'
    elif augment.mixup or augment.cutmix:
        reason = 'config.augment.mixup or cutmix mixes the images of each batch'
    elif augment != cfg.Augment() and not config.features.views:
        reason = (
            'config.augment changes the images at each step; set config.features.views to the '
            'number of augmented views to cache of each image'
        )
    elif need_images:
        reason = f'config.{need_images[0]} needs the images'
    if mode == 'always' and reason:
        raise UserError(f'config.features.cache is always, but {reason}')
    return cut if mode != 'never' and not reason else ''


def _size_at(config: cfg.Config, cut: str, input_shape: tuple[int, ...]) -> float:
    """The numbers in the output of a layer, for each of a prepared image."""
    network = build(cfg.replace(config, {'model.cut': cut}).model, 2)
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    out, _ = jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, train=False, method='features'),
        image,
    )
    return out.size / image.size


def feature_folder() -> Path:
    """Return the folder of all cached features."""
    return cache_folder() / 'features'


def views_at(first: int, count: int, n: int, views: int) -> Int[np.ndarray, ' count']:
    """The view of each of `count` examples from position `first` on; epochs alternate `views`."""
    return (first + np.arange(count)) // n % views


@dataclass(frozen=True)
class Extractor:
    """Computes features, or reads them; `prepare` turns uint8 images into the backbone's input."""

    config: cfg.Config
    num_classes: int
    prepare: Callable[[Array], Array]
    spec: dict[str, Any]  # a description of `prepare` for the cache key
    backbone: dict[str, Any]  # its variables, as `State.backbone`

    def key(self, image_shape: Sequence[int], view: int | None) -> str:
        """Return the SHA-256 of everything that features depend on besides their image."""
        import PIL

        model, data = self.config.model, self.config.data
        weights = [np.asarray(leaf).tobytes() for leaf in params.flatten(self.backbone).values()]
        augment = None if view is None else (self.config.seed, view, vars(self.config.augment))
        # XLA's own convolutions have other bits with another number of threads.
        shared = on_cpu() and not (native.available() and model.dtype == 'float32')
        facts = {
            'resize': [data.resize, *image_shape],
            'preprocessing': self.spec,
            'cut': [model.name, model.cut],
            'compute': [model.dtype, _batch_size(image_shape)],
            'dtype': self.config.features.dtype,
            'augment': augment,
            'decoding': [decode.RULE, PIL.__version__],
            'jax': jax.__version__,
            'device': jax.devices()[0].device_kind,
            'arithmetic': [ARITHMETIC, on_cpu() and [native.library().key, model.winograd]],
            'threads': shared and runtime.configure().threads,
        }
        return digest(json.dumps(facts, sort_keys=True), *weights)

    @cached_property
    def weights(self) -> dict[str, Any]:
        """The backbone's variables as the compiled function takes them, transformed once."""
        return jax.jit(self._weights)(self.backbone)

    def _weights(self, backbone: dict[str, Any]) -> dict[str, Any]:
        if self.config.model.dtype != 'float32' or self.config.model.winograd == 'never':
            return backbone
        return params.unflatten(transform_kernels(params.flatten(backbone)))

    def function(self, view: int | None) -> Callable[[dict, Array, Array], Float[Array, 'b i j d']]:
        """Return a jitted function from `weights`, uint8 images and their indices to features."""
        model = build(self.config.model, self.num_classes)
        augment = self.config.augment

        @jax.jit
        def compute(weights, images, index):
            if view is None:
                x = self.prepare(images)
            else:
                key = rng.key(self.config.seed, 'augment', view)
                x = augment_and_normalize(augment, key, images, index, self.prepare)
            with nn.intercept_methods(winograd_interceptor):
                out: Any = model.apply(weights, x, train=False, method='features')
            return out.astype(self.config.features.dtype)

        return compute

    def extract(self, batches: Any, view: int | None = None) -> Rows:
        """Return the features of a split, or of a view of it."""
        compute, size = self.function(view), _batch_size(batches.image_shape)
        shape = jax.eval_shape(
            compute,
            jax.eval_shape(self._weights, self.backbone),
            jax.ShapeDtypeStruct((1, *batches.image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ).shape[1:]
        dtype, stored = DTYPES[self.config.features.dtype]
        fitting = BYTES_PER_FILE // (np.prod(shape) * np.dtype(dtype).itemsize)
        per_file = size * max(1, int(min(fitting, PER_FILE)) // size)
        folder = feature_folder() / self.key(batches.image_shape, view)[:32]
        model, sides = self.config.model, '×'.join(map(str, batches.image_shape))
        augmented = '' if view is None else f', augmented (view {view})'
        network = f'{model.name} {model.cut} (weights: {model.weights})'
        about = f'{network}, {sides}, {self.config.features.dtype}{augmented}'

        # By the native convolutions an image has the same bits in each place of a batch, but not in
        # batches of each size.
        def fill(positions: np.ndarray, out: np.ndarray) -> None:
            for first in range(0, len(positions), size):
                index = positions[first : first + size]
                padded = np.pad(index, (0, size - len(index)), mode='edge').astype(np.int32)
                rows = self.compute_batch(compute, batches, padded)[: len(index)]
                out[first : first + size] = rows.view(stored)

        keys = batches.digests()
        if view is not None:  # which is drawn by the example's number
            keys = [sha256(key + i.to_bytes(8, 'little')).digest() for i, key in enumerate(keys)]
        label = f'features of {batches.n:,} images'
        share = jax.process_index(), jax.process_count()
        rows = Store(folder, shape, stored, per_file, about).rows(keys, fill, label, share)
        return Rows([part.view(dtype) for part in rows.parts], rows.places)

    def compute_batch(self, compute: Callable, batches: Any, index: np.ndarray) -> np.ndarray:
        """Compute the features of some examples."""
        return np.asarray(compute(self.weights, batches.read(index), index))


def _batch_size(image_shape: Sequence[int]) -> int:
    """The number of images computed at once."""
    pixels = PIXELS_PER_BATCH if on_cpu() else PIXELS_PER_BATCH_ON_ACCELERATORS
    return int(np.clip(pixels // np.prod(image_shape[:2]), 8, PER_FILE))


class FeatureBatches(Batches):
    """Batches with features in place of images, in the order of the images' batches.

    Features that fit into `memory_gb` are put on the device once; others are read from their
    files batch by batch. Epochs alternate between several views. On several devices each process
    reads its part.
    """

    def __init__(
        self,
        source: Any,
        views: list[Rows],
        data: cfg.Data,
        which: str,
        seed: int,
        layout: Layout | None = None,
    ):
        super().__init__(
            source,
            views[0].shape,
            batch=data.batch if which == 'train' else data.eval_batch or data.batch,
            seed=seed,
            balance=data.balance and which == 'train',
            process=(jax.process_index(), jax.process_count()),
            sharding=layout and layout.batch,
        )
        self._views = views
        self.streams = sum(view.nbytes for view in views) > data.memory_gb * 1e9
        self._on_device = None
        if not self.streams:
            features = [view[np.arange(self.n)] for view in views]
            self._on_device = put(np.concatenate(features), layout and layout.replicated)
            self._gather = jax.jit(
                lambda features, rows: features[rows], out_shardings=self._sharding
            )

    def train(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Yield training batches from step `start_step` on, without end."""
        for step in itertools.count(start_step):
            index, mask = self._train_indices(step)
            first = step * self._batch + self._process[0] * len(index)
            yield self._examples(index, mask, views_at(first, len(index), self.n, len(self._views)))

    def evaluate(self) -> Iterator[dict[str, Any]]:
        """Yield each example once, the last batch padded."""
        for index, mask in self._eval_indices():
            yield self._examples(index, mask, np.zeros(len(index), np.int64))

    def _examples(self, index: np.ndarray, mask: np.ndarray, view: np.ndarray) -> dict[str, Any]:
        if self._on_device is not None:
            rows = (view * self.n + index).astype(np.int32)
            features = self._gather(self._on_device, self._put(rows))
        else:
            rows = [self._views[of][[i]] for of, i in zip(view, index)]
            features = self._put(np.concatenate(rows))
        others = {'label': self.labels[index], 'index': index, 'mask': mask}
        return {'image': features, **self._put(others)}

    def _put(self, tree: Any) -> Any:
        # A single device copies arrays when they are used, in a tenth of the time.
        return put(tree, self._sharding) if self._sharding else tree
