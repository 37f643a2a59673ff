"""A source of labelled images: random access, uint8 pixels, integer labels, class names."""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

from cnn_jax import config
from cnn_jax.errors import UserError

KINDS = ('mnist_5k', 'digits', 'tfds:NAME', 'folder:PATH', 'idx:PATH')


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images: `source[i]` is `(image uint8 [h, w, channels], label int)`.

    Everything but the pixels is known without decoding. To add a kind of source, write a
    function that returns one of these; `cnn_jax.data.bundled` is the shortest example.

    Errors:
        UserError: No examples, fewer than two classes, or a label that is no index of
            `class_names`.
    """

    name: str
    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, ' n']
    sizes: Int32[np.ndarray, 'n 2']  # height and width, in pixels
    channels: int  # 1 or 3, the same for all images
    read: Callable[[int], UInt8[np.ndarray, 'h w c']]
    describe: Callable[[int], str]  # where example i comes from, for messages
    fingerprint: str  # SHA-256 of the content, in hex
    encoded: bool = False  # whether `read` decodes, so that its results are worth keeping
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason) of images that cannot be read

    def __post_init__(self):
        if not len(self.labels):
            raise UserError(f'{self.name} has no images; name a source or a split that has some')
        if len(self.class_names) < 2:
            raise UserError(f'{self.name} has one class only; a classification needs two or more')
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(wrong):
            i = int(wrong[0])
            raise UserError(
                f'{self.describe(i)} of {self.name} has label {self.labels[i]}, but labels run '
                f'from 0 to {len(self.class_names) - 1}; correct the label or remove the example'
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[UInt8[np.ndarray, 'h w c'], int]:
        return self.read(i), self.labels.item(i)


def open_split(data: config.Data, which: str) -> Source:
    """The training (`which` is `train`) or evaluation (`eval`) examples that a config names."""
    split = {'train': data.train, 'eval': data.eval}[which]
    return open_source(
        data.source,
        split=split,
        data_dir=data.data_dir,
        classes=data.classes,
        max_corrupt=data.max_corrupt,
    )


def open_source(
    name: str,
    *,
    split: str,
    data_dir: str = '',
    classes: tuple[str, ...] = (),
    max_corrupt: float = config.Data.max_corrupt,
) -> Source:
    """The examples of one split of a named source.

    Args:
        name: One of `KINDS`.
        split: A part or a slice of one, see `cnn_jax.data.splits.select`.
        data_dir: Where TFDS keeps prepared sets; '' is its default.
        classes: Only these, renumbered in this order; () is all.
        max_corrupt: The share of unreadable images, from 0 to 1, above which it is an error.

    Errors:
        UserError: The name is unknown, or what the source's own module finds wrong.
    """
    from cnn_jax.data import bundled, folder, idx, splits, tfds

    kind, _, argument = name.partition(':')
    if name in ('mnist_5k', 'digits'):
        parts = {'all': {'mnist_5k': bundled.mnist_5k, 'digits': bundled.digits}[name]}
    elif kind == 'folder' and argument:
        parts = folder.parts(argument, max_corrupt)
    elif kind == 'idx' and argument:
        parts = idx.parts(argument)
    elif kind == 'tfds' and argument:
        parts = tfds.parts(argument, data_dir, max_corrupt)
    else:
        near = difflib.get_close_matches(name, KINDS, 1, cutoff=0)[0]
        raise UserError(
            f'config.data.source is {name!r}; it can be {", ".join(KINDS)}; did you mean {near}?'
        )
    if classes:
        parts = {
            part: lambda open_part=open_part: splits.of_classes(open_part(), classes)
            for part, open_part in parts.items()
        }
    return splits.select(name, parts, split)


def from_arrays(
    name: str,
    images: UInt8[np.ndarray, 'n h w c'],
    labels: Int32[np.ndarray, ' n'],
    class_names: tuple[str, ...],
) -> Source:
    """A source of images that are already decoded."""
    n, height, width, channels = images.shape
    labels = np.asarray(labels, np.int32)
    return Source(
        name=name,
        class_names=class_names,
        labels=labels,
        sizes=np.broadcast_to(np.array([height, width], np.int32), (n, 2)),
        channels=channels,
        read=lambda i: images[i],
        describe=lambda i: f'example {i}',
        fingerprint=digest(repr((images.shape, class_names)), images.tobytes(), labels.tobytes()),
    )


def digest(*parts: str | bytes) -> str:
    """SHA-256, in hex, of the parts, each preceded by its length (so that borders count)."""
    total = hashlib.sha256()
    for part in parts:
        part = part.encode('utf-8', 'surrogateescape') if isinstance(part, str) else part
        total.update(len(part).to_bytes(8, 'little'))
        total.update(part)
    return total.hexdigest()
