"""A source of labelled images: random access, uint8 pixels, integer labels, class names."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

from cnn_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images: `source[i]` is `(image uint8 [h, w, channels], label int)`.

    Everything but the pixels is known without decoding. To add a kind of source, write a
    function that returns one of these; `cnn_jax.data.sources.mnist_5k` is the shortest example.

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
