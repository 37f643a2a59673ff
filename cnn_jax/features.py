"""Outputs of a frozen backbone, computed once and kept on disk; training then runs on them.

Features are kept in files of some hundred examples in the user's cache folder. Each appears whole
or not at all, so that a killed computation goes on where it was, and their names are digests of
all that the features depend on: nothing stale can be read.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from cnn_jax import config as cfg
from cnn_jax import params, rng
from cnn_jax.data import decode
from cnn_jax.data.augment import augment_and_normalize
from cnn_jax.data.batches import eval_batches, local_size, put, train_indices
from cnn_jax.data.source import digest
from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder, cached_array
from cnn_jax.mesh import Layout
from cnn_jax.models import build
from cnn_jax.nn.winograd import transform_kernels, winograd_interceptor

PIXELS = 400_000  # computed at once on a CPU: eight images of 224×224 stay in its caches
PIXELS_ON_ACCELERATORS = 20 * PIXELS
ARITHMETIC = 3  # raised when the backbone computes other bits: features are never stale
SHARD = 256  # examples a file: what a kill can lose, some seconds of work

# In memory, and in a file: .npy knows no bfloat16, so its bits are kept.
DTYPES = {'float32': (np.float32, np.float32), 'bfloat16': (ml_dtypes.bfloat16, np.uint16)}


def is_cached(config: cfg.Config, trainable: Iterable[str]) -> bool:
    """Whether a phase that trains these parameters reads features instead of images.

    Errors:
        UserError: config.features.cache is `always` but the features are not the same at each
            step.
    """
    wish = config.features.cache
    augments = config.augment != cfg.Augment()
    reason = ''
    if config.model.name != 'vgg16':
        reason = f'config.model.name is {config.model.name}, which has no backbone'
    elif any(name.startswith('backbone/') for name in trainable):
        reason = 'the backbone is trained (config.train.frozen lacks backbone/*)'
    elif config.augment.mixup or config.augment.cutmix:
        reason = 'config.augment.mixup or cutmix mixes the images of each batch'
    elif augments and not config.features.views:
        reason = (
            'config.augment changes the images at each step; set config.features.views to the '
            'number of augmented views to keep of each'
        )
    if wish == 'always' and reason:
        raise UserError(f'config.features.cache is always, but {reason}')
    return wish != 'never' and not reason


def views_at(first: int, count: int, n: int, views: int) -> np.ndarray:
    """The kept view that each of `count` examples is seen in, which takes turns by epoch.

    Args:
        first: Place of the first of them among all that training goes through.
        count: How many.
        n: Examples of an epoch.
        views: How many are kept.
    """
    return (first + np.arange(count)) // n % views


@dataclass(frozen=True)
class Extractor:
    """Computes the features of images.

    Attributes:
        config: The run's config.
        num_classes: Of the data.
        prepare: From uint8 images to what the backbone takes.
        spec: `prepare` in words, for the key.
        backbone: The backbone's parameters.
    """

    config: cfg.Config
    num_classes: int
    prepare: Callable[[Array], Array]
    spec: dict[str, Any]
    backbone: dict[str, Any]

    def key(self, batches: Any, view: int | None) -> str:
        """SHA-256 of all that the features of a split depend on."""
        import PIL

        model, data = self.config.model, self.config.data
        weights = [
            leaf.tobytes() for leaf in map(np.asarray, params.flatten(self.backbone).values())
        ]
        augment = None if view is None else (self.config.seed, view, vars(self.config.augment))
        facts = {
            'fingerprint': batches.fingerprint,
            'resize': [data.resize, *batches.image_shape],
            'preprocessing': self.spec,
            'cut': model.cut,
            'compute': model.dtype,
            'dtype': self.config.features.dtype,
            'augment': augment,
            'decoding': [decode.RULE, PIL.__version__],
            'jax': jax.__version__,
            'device': jax.devices()[0].device_kind,
            'arithmetic': ARITHMETIC,
        }
        return digest(json.dumps(facts, sort_keys=True), *weights)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """The backbone's parameters as `function` takes them."""
        return jax.jit(self._weights)(self.backbone)

    def _weights(self, backbone: dict[str, Any]) -> dict[str, Any]:
        if self.config.model.dtype != 'float32':
            return backbone
        return params.unflatten(transform_kernels(params.flatten(backbone)))

    def function(self, view: int | None) -> Callable[[dict, Array, Array], Float[Array, 'b i j d']]:
        """The compiled computation: `weights`, uint8 images and their indices to features."""
        model = build(self.config.model, self.num_classes)
        augment = self.config.augment

        @jax.jit
        def compute(weights, images, index):
            if view is None:
                x = self.prepare(images)
            else:
                key = rng.key(self.config.seed, 'augment', view)
                x = augment_and_normalize(augment, key, images, index, self.prepare)
            variables = {'params': {'backbone': weights}}
            with nn.intercept_methods(winograd_interceptor):
                out: Any = model.apply(variables, x, train=False, method='features')
            return out.astype(self.config.features.dtype)

        return compute

    def extract(self, batches: Any, view: int | None = None) -> list[np.ndarray]:
        """The features of every example, in order, as memory-mapped pieces of `SHARD`.

        Args:
            batches: The opened batches of a split.
            view: Number of the augmented view; None for the images as they are.
        """
        key, compute = self.key(batches, view), self.function(view)
        batch = min(_batch(batches.image_shape), batches.n)
        shape = jax.eval_shape(
            compute,
            jax.eval_shape(self._weights, self.backbone),
            jax.ShapeDtypeStruct((1, *batches.image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ).shape[1:]
        dtype, stored = DTYPES[self.config.features.dtype]
        folder = cache_folder() / 'features' / key[:32]
        pieces = {}
        starts = range(0, batches.n, SHARD)
        # Each process begins elsewhere, so that those which share a cache folder share the work.
        turn = len(starts) * jax.process_index() // jax.process_count()
        turned = [*starts[turn:], *starts[:turn]]
        for start in _track(turned, f'features of {batches.n:,} images'):
            stop = min(start + SHARD, batches.n)

            def fill(out, start=start, stop=stop):
                for first in range(start, stop, batch):
                    index = np.arange(first, first + batch, dtype=np.int32)
                    rows = self.rows(compute, batches, index)[: stop - first]
                    out[first - start : first - start + len(rows)] = rows.view(stored)

            path = folder / f'{start // SHARD:06d}.npy'
            piece = cached_array(path, (stop - start, *shape), fill, stored)
            pieces[start] = piece.view(dtype)
        return [pieces[start] for start in starts]

    def rows(self, compute: Callable, batches: Any, index: np.ndarray) -> np.ndarray:
        """The features of some examples; positions past the end repeat the last one."""
        images = batches.read(np.minimum(index, batches.n - 1))
        return np.asarray(compute(self.weights, images, index))


def _batch(image_shape: tuple[int, ...]) -> int:
    """Images computed at once."""
    pixels = PIXELS if jax.default_backend() == 'cpu' else PIXELS_ON_ACCELERATORS
    return int(np.clip(pixels // np.prod(image_shape[:2]), 8, SHARD))


def _track(starts: list[int], label: str) -> Iterable[int]:
    if not sys.stderr.isatty():
        return starts
    from rich.console import Console
    from rich.progress import track

    return track(starts, label, console=Console(stderr=True), transient=True)


class FeatureBatches:
    """Batches whose 'image' is the image's features; the order is that of the images' batches.

    Features that fit into `memory_gb` are put on the device once; others are read from their
    files batch by batch. With several views, the epoch chooses the view in turn.

    Args:
        source: The batches of images, for labels and order.
        views: The features of each view, as `Extractor.extract` gives them.
        data: Batch sizes and memory.
        which: `train` or `eval`.
        seed: Of the order.
        layout: On several devices, where batches go; each process takes its part of every one.
    """

    def __init__(
        self,
        source: Any,
        views: list[list[np.ndarray]],
        data: cfg.Data,
        which: str,
        seed: int,
        layout: Layout | None = None,
    ):
        self.n, self.labels, self.class_names = source.n, source.labels, source.class_names
        self.fingerprint = source.fingerprint
        self._seed, self._layout = seed, layout
        self._share = jax.process_index(), jax.process_count()
        self._batch = data.batch if which == 'train' else data.eval_batch or data.batch
        self._pieces = [piece for view in views for piece in view]
        self._per_view, self._views = len(views[0]), len(views)
        nbytes = sum(piece.nbytes for piece in self._pieces)
        self.streams = nbytes > data.memory_gb * 1e9  # the next batch may have to be waited for
        self._on_device = None
        if not self.streams:
            whole = np.concatenate(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
            self._on_device = put(whole, layout and layout.replicated)
            self._gather = jax.jit(
                lambda features, rows: features[rows], out_shardings=layout and layout.batch
            )

    def train(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """The endless training batches from step `start_step` on."""
        local = local_size(self._batch, self._share[1])
        mask = np.ones(local, bool)
        step = start_step
        while True:
            index = train_indices(self.n, self._batch, self._seed, step, *self._share)
            first = step * self._batch + self._share[0] * local
            yield self._take(index, mask, views_at(first, local, self.n, self._views))
            step += 1

    def evaluate(self) -> Iterator[dict[str, Any]]:
        """Each example once, the last batch padded."""
        for index, mask in eval_batches(self.n, self._batch, *self._share):
            yield self._take(index, mask, np.zeros(len(index), np.int64))

    def _take(self, index: np.ndarray, mask: np.ndarray, view: np.ndarray) -> dict[str, Any]:
        if self._on_device is not None:
            rows = (view * self.n + index).astype(np.int32)
            features = self._gather(self._on_device, self._placed(rows))
        else:
            pieces = view * self._per_view + index // SHARD
            features = self._placed(
                np.stack([self._pieces[p][i] for p, i in zip(pieces, index % SHARD)])
            )
        rest = {'label': self.labels[index], 'index': index, 'mask': mask}
        return {'image': features, **self._placed(rest)}

    def _placed(self, tree: Any) -> Any:
        # One device takes arrays over when they are used, in a tenth of the time.
        return put(tree, self._layout.batch) if self._layout else tree
