"""Splits of a source: its own parts, a fixed division where it has none, and slices of them.

`train[:80%]`, `train[10%:20%]` and `train[:500]` are slices of one fixed order of the part,
shuffled, and `interleaved` by class. So slices that share a border are disjoint and complete, and
every `[:n]` and `[n:]` holds each class in proportion, to within one example.
"""

import dataclasses
import heapq
import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int32, Int64

from cnn_jax.data.source import Source, digest
from cnn_jax.errors import UserError, nearest

# The part of each class of a source that is not divided yet; at least one example.
TRAIN_PERCENT = 80
IS_VALIDATION = ('val', 'valid', 'dev', 'test')  # names of `validation`, where they name no part
# The order of the examples is part of every published number: never change this.
ORDER_KEY = 0x5EED_0F_5A11CE


def select(
    name: str,
    parts: Mapping[str, Callable[[], Source]],
    split: str,
    classes: tuple[str, ...] = (),
    divide: bool = True,
) -> Source:
    """Select the examples that `split` names.

    Args:
        name: The source's name, for messages.
        parts: Functions that open the parts.
        split: A part, or `all`, or a slice of either, `NAME[from:to]`: numbers of examples or
            whole percents, each of them optional.
        classes: As in `of_classes`.
        divide: Whether to divide a source with a single part, class by class, into `train` (80%)
            and `test` (20%); else `train` is all of it.

    Returns:
        A source. Where there is no part `test` but a `validation`, this is tested on, with a note.

    Errors:
        UserError: The part is unknown; the slice is malformed, too long or empty.
    """
    asked, *_ = _parse(split)
    names = [*parts, 'all'] if len(parts) > 1 else ['train', 'test', 'all']
    is_validation = asked not in names and asked in IS_VALIDATION and 'validation' in names
    part = 'validation' if is_validation else asked
    if part not in names:
        near = nearest(asked, names)
        raise UserError(f'{name} has no split {asked!r}; it has {", ".join(names)}{near}')
    opened = parts.values() if part == 'all' or len(parts) == 1 else [parts[part]]
    sources = [of_classes(open_part(), classes) for open_part in opened]
    whole = joined(sources, name) if len(sources) > 1 else sources[0]
    if len(parts) == 1 and part != 'all' and divide:
        by_class, rank, size = _shuffled_classes(whole.labels)
        in_train = rank < np.maximum(1, size * TRAIN_PERCENT // 100)
        chosen = by_class[in_train if part == 'train' else ~in_train]
        whole = subset(whole, np.sort(chosen), f'{name} {part}')
    source = cut(whole, split, name)
    if asked == 'test' and part == 'validation':
        note = f'{name} has no test part, so it is evaluated on its validation part'
        source = dataclasses.replace(source, notes=(*source.notes, note))
    return source


def cut(source: Source, split: str, name: str = '') -> Source:
    """The slice, if any, that `split` names of a part; `name` is the source's, for messages."""
    _, first, last = _parse(split)
    if first is None and last is None:
        return source
    n, name = len(source), name or source.name
    start, stop = _position(first or '0', n, split), _position(last or '100%', n, split)
    if start >= stop:
        raise UserError(f'{split} of {name} is empty: there are {n} examples; widen the slice')
    return subset(source, interleaved(source.labels)[start:stop], f'{name} {split}')


def fold(
    labels: Int32[np.ndarray, ' n'], number: int, folds: int
) -> tuple[Int64[np.ndarray, ' m'], Int64[np.ndarray, ' k']]:
    """The positions to train on and to test on in fold `number` of `folds`.

    Each example is tested on in one fold, and each fold holds every class in proportion.
    """
    n, order = len(labels), interleaved(labels)
    first, last = number * n // folds, (number + 1) * n // folds
    if first == last:
        raise UserError(f'config.data.folds is {folds}, more than the {n} images; lower it')
    return np.concatenate([order[:first], order[last:]]), order[first:last]


def held_out(labels: Int32[np.ndarray, ' n'], count: int) -> Int64[np.ndarray, ' count']:
    """The last `count` positions of the fixed order: the part to choose and to stop by."""
    _refuse_short(labels, count, 'validation', left=1)
    return interleaved(labels)[len(labels) - count :]


def drawn(
    labels: Int32[np.ndarray, ' n'], count: int, seed: int, validation: int = 0
) -> Int64[np.ndarray, ' m']:
    """The positions that a seed draws, each class in proportion, of all but the held-out ones.

    Seeds 0, 1, … take disjoint parts of the fixed order while there are any; later seeds draw anew
    without replacement, and overlap. `count` 0 is all.

    Errors:
        UserError: There are fewer examples.
    """
    _refuse_short(labels, count, 'subset', left=validation)
    rest = interleaved(labels)[: len(labels) - validation]
    if not count:
        return rest
    if (seed + 1) * count > len(rest):
        rest, seed = rest[interleaved(labels[rest], ORDER_KEY + 1 + seed)], 0
    return rest[seed * count :][:count]


def _refuse_short(labels: np.ndarray, count: int, field: str, left: int) -> None:
    if count + left > len(labels):
        held = f', of which {left:,} are held out' if left > 1 else ''
        raise UserError(
            f'config.data.{field} asks for {count:,} of {len(labels):,} training images{held}; '
            'lower it'
        )


def part_of(split: str) -> str:
    """The part of a source that a split is of: `train` of `train[:500]`."""
    return _parse(split)[0]


def _parse(split: str) -> tuple[str, str | None, str | None]:
    match = re.fullmatch(r'([\w.-]+)(?:\[(\d+%?)?:(\d+%?)?\])?', split)
    if not match:
        raise UserError(
            f'{split!r} is not a split; write a name, such as train, or a slice, such as '
            'train[:80%], train[80%:] or train[:500]'
        )
    return match[1], match[2], match[3]


def _position(border: str, n: int, split: str) -> int:
    number, percent = int(border.removesuffix('%')), border.endswith('%')
    if number > (100 if percent else n):
        there = '100%' if percent else f'{n} examples'
        raise UserError(f'{split} goes to {border}, but there are {there}; shorten the slice')
    return n * number // 100 if percent else number


def interleaved(labels: Int32[np.ndarray, ' n'], key: int = ORDER_KEY) -> Int64[np.ndarray, ' n']:
    """A shuffled order in which every prefix holds each class in proportion, to within one example.

    The r-th example of a class stands between ⌊r·n/n_c⌋ and ⌈(r+1)·n/n_c⌉ − 1. To give each
    position to the example whose deadline is the earliest always succeeds (Baruah et al. 1996,
    Proportionate progress; Tijdeman 1980, The chairman assignment problem).
    """
    n = len(labels)
    by_class, rank, size = _shuffled_classes(labels, key)
    release, deadline = rank * n // size, -(-(rank + 1) * n // size)
    order, waiting, jobs = [], [], np.argsort(release, kind='stable')
    starts = np.searchsorted(release[jobs], np.arange(n + 1)).tolist()
    jobs, deadline = jobs.tolist(), deadline.tolist()
    for first, last in itertools.pairwise(starts):
        for job in jobs[first:last]:  # those that may stand here for the first time
            heapq.heappush(waiting, (deadline[job], job))
        order.append(heapq.heappop(waiting)[1])
    return by_class[order]


def _shuffled_classes(
    labels: np.ndarray, key: int = ORDER_KEY
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, class after class and each class shuffled; ranks in the class; class sizes.

    The shuffle ranks Philox's raw output, which NumPy keeps across versions and machines.
    """
    n = len(labels)
    shuffled = np.argsort(np.random.Philox(key=key).random_raw(n), kind='stable')
    counts = np.bincount(labels).astype(np.int64)
    rank = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    by_class = shuffled[np.argsort(labels[shuffled], kind='stable')]
    return by_class, rank, np.repeat(counts, counts)


def subset(source: Source, indices: np.ndarray, name: str) -> Source:
    """The examples of `source` at `indices`, in that order."""
    indices, content = np.asarray(indices, np.int64), source.content
    return dataclasses.replace(
        source,
        name=name,
        labels=source.labels[indices],
        sizes=source.sizes[indices],
        read=lambda i: source.read(int(indices[i])),
        describe=lambda i: source.describe(int(indices[i])),
        fingerprint=digest(source.fingerprint, indices.astype('<i8').tobytes()),
        content=content and (lambda i: content(int(indices[i]))),
    )


def of_classes(source: Source, classes: tuple[str, ...]) -> Source:
    """The examples of some classes only, renumbered in the given order; for () all.

    Errors:
        UserError: The source does not have a class, or one is named twice.
    """
    if not classes:
        return source
    by_form = {unicodedata.normalize('NFC', name): name for name in source.class_names}
    classes = tuple(by_form.get(unicodedata.normalize('NFC', name), name) for name in classes)
    for name in {*classes} - {*source.class_names}:
        raise UserError(
            f'config.data.classes names {name!r}, which {source.name} does not have'
            f'{nearest(name, source.class_names)}'
        )
    if len(set(classes)) < len(classes):
        raise UserError(f'config.data.classes names a class twice: {", ".join(classes)}')
    old = [source.class_names.index(name) for name in classes]
    chosen = np.flatnonzero(np.isin(source.labels, old))
    new = np.full(len(source.class_names), -1, np.int32)
    new[old] = np.arange(len(old))
    selected = subset(source, chosen, f'{source.name} ({", ".join(classes)})')
    return dataclasses.replace(
        selected,
        class_names=classes,
        labels=new[selected.labels],
        fingerprint=digest(selected.fingerprint, *classes),
    )


def joined(sources: list[Source], name: str) -> Source:
    """The examples of several sources with the same classes, one source after the other."""
    owners = [source for source in sources for _ in range(len(source))]
    positions = [i for source in sources for i in range(len(source))]
    contents = [source.content for source in sources if source.content for _ in range(len(source))]
    return Source(
        name=name,
        class_names=sources[0].class_names,
        labels=np.concatenate([source.labels for source in sources]),
        sizes=np.concatenate([source.sizes for source in sources]),
        channels=max(source.channels for source in sources),
        read=lambda i: owners[i].read(positions[i]),
        describe=lambda i: owners[i].describe(positions[i]),
        fingerprint=digest(*(source.fingerprint for source in sources)),
        encoded=any(source.encoded for source in sources),
        skipped=tuple(entry for source in sources for entry in source.skipped),
        notes=tuple(note for source in sources for note in source.notes),
        content=(lambda i: contents[i](positions[i])) if len(contents) == len(owners) else None,
    )
