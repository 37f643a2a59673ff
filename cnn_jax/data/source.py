"""A source of labelled images: random access, uint8 pixels, integer labels, class names."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from cnn_jax.errors import UserError, reason_of

Skipped = tuple[tuple[str, str], ...]  # (path, reason); up to a colon, a reason is a kind
MOST_CLASSES = 100_000
UNREADABLE = 'unreadable'  # the kind of reason of an image that cannot be read


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images: `source[i]` is `(image uint8 [h, w, channels], label int)`.

    Images may be read or computed when they are needed; arrays are made a source by `as_source`.

    Errors:
        UserError: No examples, fewer than two classes, two of one name, or a label that names none.

    >>> labels = np.array([0, 1, 0], np.int32)
    >>> source = Source(
    ...     name='squares',
    ...     class_names=('dark', 'light'),
    ...     labels=labels,
    ...     sizes=np.full((3, 2), 8, np.int32),
    ...     channels=1,
    ...     read=lambda i: np.full((8, 8, 1), 200 * labels[i], np.uint8),
    ...     describe=lambda i: f'square {i}',
    ...     fingerprint='squares, version 1',
    ... )
    >>> source[1][0].max(), source[1][1]
    (np.uint8(200), 1)
    """

    name: str
    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, ' n']
    sizes: Int32[np.ndarray, 'n 2']  # height and width, in pixels
    channels: int  # 1 or 3, the same for all images
    read: Callable[[int], UInt8[np.ndarray, 'h w c']]
    describe: Callable[[int], str]  # the origin of example i, for messages
    fingerprint: str  # changes with the content: a run is not resumed on other data
    encoded: bool = False  # `read` decodes, so that its results are worth caching
    skipped: Skipped = ()  # what was given and is left out
    notes: tuple[str, ...] = ()  # what a run says of it at its start
    content: Callable[[int], str] | None = None  # SHA-256 of the bytes that example i is decoded of

    def __post_init__(self):
        if not len(self.labels):
            raise UserError(f'{self.name} has no images; name a source or a split that has some')
        if len(self.class_names) < 2:
            raise UserError(f'{self.name} has one class only; a classification needs two or more')
        if len({*self.class_names}) < len(self.class_names):
            raise UserError(f'{self.name} has two classes of one name; rename one of them')
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


def count_left_out(skipped: Iterable[tuple[str, str]]) -> str:
    """Count what is left out, each path once: `40 .heic, 2 without an ending, 3 unreadable`."""
    kinds = Counter(reason.partition(':')[0] for reason in dict(skipped).values())
    return ', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())


def remarks(train: Any, evaluation: Any) -> list[str]:
    """The lines that a run says at its start of its two `Source`s, or of their batches."""
    lines = list(dict.fromkeys([*train.notes, *evaluation.notes]))
    if getattr(train, 'balance', False):
        counts = np.bincount(train.labels)
        share = len(train.labels) / np.count_nonzero(counts)  # draws of each class in an epoch
        least, most = share / counts.max(), share / counts[counts > 0].min()
        lines.append(
            f'classes are drawn equally often: an epoch is {len(train.labels):,} draws, in which '
            f'an image is seen {least:.2g} times (of the largest class) to {most:.2g} times'
        )
    for what, split in (('training', train), ('evaluation', evaluation)):
        counts = np.bincount(split.labels, minlength=len(split.class_names))
        absent = [split.class_names[k] for k in np.flatnonzero(counts == 0)]
        if absent:
            more = f' and {len(absent) - 5:,} more' if len(absent) > 5 else ''
            lines.append(f'there is no {what} image of class {", ".join(absent[:5])}{more}')
    return lines


def from_arrays(
    name: str,
    images: UInt8[np.ndarray, 'n h w c'],
    labels: Int32[np.ndarray, ' n'],
    class_names: tuple[str, ...],
) -> Source:
    """A source of images that are already decoded."""
    labels, shape = np.asarray(labels, np.int32), images.shape
    return Source(
        name=name,
        class_names=class_names,
        labels=labels,
        sizes=np.broadcast_to(np.array(shape[1:3], np.int32), (len(images), 2)),
        channels=shape[3],
        read=lambda i: images[i],
        describe=lambda i: f'example {i}',
        fingerprint=digest(repr((shape, class_names)), images.ravel().data, labels.tobytes()),
    )


def as_source(data: Any, name: str = 'the data', class_names: Sequence[str] = ()) -> Source:
    """Return the user's images and labels as a `Source`.

    Args:
        data: A `Source`, `(images, labels)` or `(images, labels, class_names)`. Images are
            [n, height, width, channels], grey or RGB, uint8 or floats: those from 0 to 1 become
            round(255·x), whole numbers from 0 to 255 stay as they are. Labels are integers from 0,
            [n] or [n, 1].
        name: The name of the data, for messages.
        class_names: The names of classes 0, 1, … of data that bring none; by default '0', '1', …
            up to the largest label.

    Errors:
        UserError: A wrong type, shape, length or range; see also `Source`.

    >>> source = as_source((np.zeros((4, 8, 8, 1), np.uint8), [0, 1, 1, 0], ('cat', 'dog')))
    >>> len(source), source.class_names, source[1][1]
    (4, ('cat', 'dog'), 1)
    """
    if isinstance(data, Source):
        return data
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise UserError(
            f'{name} must be a Source, (images, labels) or (images, labels, class_names), not '
            f'{type(data).__name__}'
        )
    images, labels = _pixels(data[0], name), _labels(data[1], name)
    if len(images) != len(labels):
        raise UserError(
            f'{name} has {len(images)} images but {len(labels)} labels; give a label for each'
        )
    given = data[2] if len(data) == 3 else class_names
    if not isinstance(given, Iterable):
        raise UserError(f'the class names of {name} are {given!r}; give a name for each class')
    names = tuple(map(str, given))
    if not names:
        names = tuple(str(k) for k in range(int(labels.max(initial=0)) + 1))
    return from_arrays(name, images, labels, names)


def _array(given: Any, what: str) -> np.ndarray:
    if np.ma.isMaskedArray(given):
        raise UserError(f'{what} are a masked array; leave out what it masks')
    try:
        return np.asarray(given)
    except ValueError as error:  # of different lengths
        raise UserError(f'{what} are no array ({reason_of(error)}); give one') from error


def _pixels(images: Any, name: str) -> UInt8[np.ndarray, 'n h w c']:
    images = _array(images, f'the images of {name}')
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f'the images of {name} have the shape {list(images.shape)}; they must be '
            '[n, height, width, channels] with 1 or 3 channels: images[..., None] adds the channel '
            'of grey ones, and images.transpose(0, 2, 3, 1) moves channels to the end'
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f'the images of {name} are {images.dtype}; they must be uint8, or floats from 0 to 1'
        )
    low, high = images.min(initial=0), images.max(initial=0)
    if low >= 0 and high <= 1:
        return np.round(images * 255).astype(np.uint8)
    if low >= 0 and high <= 255 and (images == np.round(images)).all():
        return images.astype(np.uint8)
    raise UserError(
        f'the images of {name} are floats from {low:g} to {high:g}; they must lie between 0 and 1, '
        'or be whole numbers between 0 and 255, before any normalization, which the run does itself'
    )


def _labels(labels: Any, name: str) -> Int32[np.ndarray, ' n']:
    labels = _array(labels, f'the labels of {name}')
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in 'iub':
        raise UserError(
            f'the labels of {name} are {labels.dtype} of the shape {list(labels.shape)}; they must '
            'be integers from 0, one for each image (of one-hot labels take labels.argmax(1))'
        )
    least, most = (int(end(initial=0)) for end in (labels.min, labels.max))
    if least < 0 or most >= MOST_CLASSES:
        raise UserError(
            f'the labels of {name} go from {least} to {most}; they must be the numbers of the '
            f'classes, from 0 to at most {MOST_CLASSES - 1:,}'
        )
    return labels.astype(np.int32)


def digest(*parts: str | bytes | memoryview) -> str:
    """SHA-256, in hex, of the parts, each preceded by its length (so that borders count)."""
    total = hashlib.sha256()
    for part in parts:
        part = part.encode('utf-8', 'surrogateescape') if isinstance(part, str) else part
        total.update(len(part).to_bytes(8, 'little'))
        total.update(part)
    return total.hexdigest()
