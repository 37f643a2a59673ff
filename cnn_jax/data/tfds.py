"""Prepared TensorFlow Datasets, read without TensorFlow.

A set of ArrayRecord files is read as encoded bytes and decoded here. One that is not prepared
yet is downloaded and prepared first, which needs TensorFlow where its builder hands over arrays
rather than encoded images (mnist and cifar10 do).
"""

import contextlib
import functools
import re
import textwrap
from collections.abc import Callable, Iterator

import numpy as np

from cnn_jax.data import decode
from cnn_jax.data.decode import Finding, load_findings, parallel_map, scan, skipped, store_findings
from cnn_jax.data.source import Source, digest
from cnn_jax.errors import UserError, nearest


def parts(name: str, data_dir: str, max_corrupt: float) -> dict[str, Callable[[], Source]]:
    """The splits of a TFDS image classification set (`NAME`, `NAME/CONFIG`, `NAME:VERSION`).

    Args:
        name, data_dir, max_corrupt: As in `cnn_jax.config.Data`; the name without `tfds:`.

    Errors:
        UserError: The set is unknown, is none of images and class labels, cannot be prepared or
            read here, or is damaged.
    """
    builder = _builder(name, data_dir)
    image, label = _feature_keys(name, builder)
    _prepare(name, builder)
    return {
        part: functools.partial(_source, name, builder, part, image, label, max_corrupt)
        for part, info in builder.info.splits.items()
        if info.num_examples
    }


def _builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds

    try:
        with _refusing_damage(f'tfds:{name}', data_dir or 'its default folder'):
            return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = nearest(name, {each: f'tfds:{each}' for each in known})
        raise UserError(
            f'TFDS has no set {name!r}, and none is prepared in '
            f'{data_dir or "its default folder"}{near}'
        ) from None


@contextlib.contextmanager
def _refusing_damage(what: str, folder) -> Iterator[None]:
    """Turn anything that TFDS and ArrayRecord raise at damaged files into a `UserError`."""
    import tensorflow_datasets as tfds

    try:
        yield
    except (UserError, tfds.core.DatasetNotFoundError):
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise UserError(
            f'{what} in {folder} is damaged ({reason}); delete it there, so that it is prepared '
            'again'
        ) from error


def _prepare(name: str, builder) -> None:
    """Download and prepare the set where it is not; leave a prepared one alone."""
    missing = f'tfds:{name} is not prepared in {builder.data_path}, and preparing it'
    try:
        builder.download_and_prepare(file_format='array_record')
    except ImportError as error:
        module = re.search(r"No module named '(\w+)", str(error))
        package = module[1] if module else 'tensorflow'
        raise UserError(
            f'{missing} needs {package}; run once: pip install {package} (downloads are kept, and '
            'reading the prepared set does not need it)'
        ) from error
    except Exception as error:  # builders fail in their own ways: network, checksums, disk
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise UserError(f'{missing} failed: {reason}') from error
    formats = [kind.value for kind in builder.info.available_file_formats()]
    if 'array_record' not in formats:
        raise UserError(
            f'tfds:{name} is prepared in {builder.data_path} as {", ".join(formats)}; set '
            'config.data.data_dir to another folder, where it is prepared as array_record'
        )


def _feature_keys(name: str, builder) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)

    def key_of(kind: type) -> str | None:
        keys = [key for key, feature in features.items() if isinstance(feature, kind)]
        supervised = [key for key in builder.info.supervised_keys or () if key in keys]
        return next(iter(supervised or keys), None)

    image, label = key_of(tfds.features.Image), key_of(tfds.features.ClassLabel)
    if image is None or label is None:
        raise UserError(
            f'tfds:{name} is not an image classification set: its features are '
            f'{", ".join(features)}, and an image and a class label are wanted'
        )
    if features[image].np_dtype == np.float32:
        raise UserError(f'tfds:{name} has images of floats; sets of 8 or 16 bits can be read')
    return image, label


def _source(name: str, builder, part: str, image: str, label: str, max_corrupt: float) -> Source:
    import tensorflow_datasets as tfds

    title = f'tfds:{name} {part}'
    with _refusing_damage(title, builder.data_path):
        records = builder.as_data_source(part, decoders={image: tfds.decode.SkipDecoding()})
        rows = _examine(records, builder, part, image, label)
    class_names = tuple(builder.info.features[label].names)
    channels = 1 if builder.info.features[image].shape[-1] in (1, 2) else 3
    where = [f'{title} record {i}' for i in range(len(records))]
    wrong = skipped(title, where, [finding for _, finding in rows], max_corrupt)
    readable = [i for i, (_, finding) in enumerate(rows) if not finding.reason]
    found = [rows[i] for i in readable]
    content = [value for number, finding in found for value in (str(number), finding.sha256)]

    def read(i: int) -> np.ndarray:
        with _refusing_damage(where[readable[i]], builder.data_path):
            return decode.with_channels(decode.decode(records[readable[i]][image]), channels)

    return Source(
        name=title,
        class_names=class_names,
        labels=np.array([number for number, _ in found], np.int32),
        sizes=np.array([finding[:2] for _, finding in found], np.int32).reshape(-1, 2),
        channels=channels,
        read=read,
        describe=lambda i: where[readable[i]],
        fingerprint=digest(builder.info.full_name, *class_names, *content),
        encoded=True,
        skipped=wrong,
        content=lambda i: found[i][1].sha256,
    )


def _examine(records, builder, part: str, image: str, label: str) -> list[tuple[int, Finding]]:
    """The label and finding of every record, from the cache or by reading all of them once."""
    files = [(file, file.stat()) for file in builder.info.splits[part].filepaths]
    key = digest(*(f'{file} {stat.length} {stat.mtime}' for file, stat in files))
    if known := load_findings(key):
        return [(number, Finding(*row)) for number, row in known]

    def examine(i: int) -> tuple[int, Finding]:
        record = records[i]
        return int(record[label]), scan(record[image])

    rows = parallel_map(examine, len(records), 'Examining images')
    store_findings(key, rows)
    return rows
