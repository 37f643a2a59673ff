"""Parameters by path: which are trained, which are decayed, what they weigh.

A path joins the names of the modules and of the parameter: `block1_conv1/kernel`. A pattern is
a shell wildcard over the whole path, in which `*` also crosses slashes: `backbone/*`.
"""

import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.errors import UserError

Flat = dict[str, Any]  # {'block1_conv1/kernel': array}
SLASH = '∕'


def flatten(params: Mapping) -> Flat:
    """A nested parameter tree as `{path: leaf}`, in the order of the paths.

    A slash within a name, as Flax's `WeightNorm` has it, becomes `∕`.
    """
    flat = flatten_dict(meta.unbox(dict(params)))
    return dict(sorted(('/'.join(map(_escaped, keys)), leaf) for keys, leaf in flat.items()))


def unflatten(flat: Flat) -> dict:
    """The nested tree that Flax's `apply` takes."""
    return unflatten_dict(
        {tuple(p.replace(SLASH, '/') for p in path.split('/')): leaf for path, leaf in flat.items()}
    )


def _escaped(name: str) -> str:
    return str(name).replace('/', SLASH)


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Return any tree with `function(path, leaf)` in place of each leaf."""

    def at(keys: Any, leaf: Any) -> Any:
        names = (jax.tree_util.keystr((key,), simple=True) for key in keys)
        return function('/'.join(map(_escaped, names)), leaf)

    return jax.tree_util.tree_map_with_path(at, tree)


def paths_of(tree: Any) -> list[str]:
    """The paths of any tree's leaves."""
    paths: list[str] = []
    map_paths(lambda path, _: paths.append(path), tree)
    return paths


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return whether any pattern matches the whole path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def select(
    paths: Iterable[str], patterns: Iterable[str], *, field: str, called: str = 'parameter'
) -> list[str]:
    """The paths that match any pattern, a shell wildcard.

    Errors:
        UserError: A pattern matches nothing, which is nearly always a typo; `field` says whose.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in paths):
            raise UserError(
                f'{field} has the pattern {pattern!r}, which matches no {called}; '
                f'the {called}s are {", ".join(paths)}'
            )
    return [path for path in paths if matches(path, patterns)]


def trainable(paths: Iterable[str], frozen: Iterable[str]) -> list[str]:
    """The paths that no `frozen` pattern matches; UserError if none is left."""
    paths = list(paths)
    fixed = set(select(paths, frozen, field='config.train.frozen'))
    left = [path for path in paths if path not in fixed]
    if not left:
        raise UserError(
            'config.train.frozen freezes every parameter, so nothing is left to train; '
            'loosen a pattern, or use launch.evaluate'
        )
    return left


def depths(paths: Iterable[str]) -> dict[str, int]:
    """The distance of each parameter from the head, in blocks.

    0 for the head, 1 for the last block (`blockN`), …, and one more than the first block for
    what comes before it (a stem).
    """
    found = {path: re.search(r'block(\d+)', path) for path in paths}
    blocks = {path: int(block[1]) for path, block in found.items() if block}
    last = max(blocks.values(), default=0)
    heads = {path: last + 1 for path in found if path.startswith('head/')}
    return {path: last + 1 - (blocks | heads).get(path, 0) for path in found}


def partition(params: Mapping, names: Iterable[str]) -> tuple[Flat, Flat]:
    """The named parameters and the rest, both flat."""
    flat, names = flatten(params), set(names)
    inside = {path: leaf for path, leaf in flat.items() if path in names}
    return inside, {path: leaf for path, leaf in flat.items() if path not in names}


def merge(*parts: Flat) -> dict:
    """The nested tree whose leaves are in the given flat parts."""
    return unflatten(functools.reduce(operator.or_, parts, {}))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or array shapes) in a tree."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'dtype')]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
