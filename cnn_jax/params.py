"""Parameters by path: which are trained, which are decayed, what they weigh.

A path joins the names of the modules and of the parameter: `block1_conv1/kernel`. A pattern is
a shell wildcard over the whole path, in which `*` also crosses slashes: `backbone/*`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.errors import UserError

Flat = dict[str, Any]  # {'block1_conv1/kernel': array}


def flatten(params: Mapping) -> Flat:
    """A nested parameter tree as `{path: leaf}`, in the order of the paths."""
    return dict(sorted(flatten_dict(meta.unbox(dict(params)), sep='/').items()))


def unflatten(flat: Flat) -> dict:
    """The nested tree that Flax's `apply` takes."""
    return unflatten_dict(flat, sep='/')


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Return any tree with `function(path, leaf)` in the place of each leaf."""

    def at(keys: Any, leaf: Any) -> Any:
        return function(jax.tree_util.keystr(keys, simple=True, separator='/'), leaf)

    return jax.tree_util.tree_map_with_path(at, tree)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return whether any pattern matches the whole path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def select(
    paths: Iterable[str], patterns: Iterable[str], *, field: str, called: str = 'parameter'
) -> list[str]:
    """The paths that match any pattern.

    Args:
        paths: Parameter paths.
        patterns: Shell wildcards.
        field: The config field that the patterns come from, for the error.
        called: The noun for what has the paths, for the error.

    Errors:
        UserError: A pattern matches nothing, which is nearly always a typo.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in paths):
            raise UserError(
                f'config.{field} has the pattern {pattern!r}, which matches no {called}; '
                f'the {called}s are {", ".join(paths)}'
            )
    return [path for path in paths if matches(path, patterns)]


def trainable(paths: Iterable[str], frozen: Iterable[str]) -> list[str]:
    """The paths that no `frozen` pattern matches.

    Errors:
        UserError: A pattern matches nothing, or everything is frozen.
    """
    paths = list(paths)
    fixed = set(select(paths, frozen, field='train.frozen'))
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
    paths = list(paths)
    numbers = {path: re.search(r'block(\d+)', path) for path in paths}
    last = max((int(found[1]) for found in numbers.values() if found), default=0)

    def depth(path: str) -> int:
        found = numbers[path]
        if found:
            return last - int(found[1]) + 1
        return 0 if path.startswith('head/') else last + 1

    return {path: depth(path) for path in paths}


def partition(params: Mapping, names: Iterable[str]) -> tuple[Flat, Flat]:
    """The named parameters and the rest, both flat."""
    flat, names = flatten(params), set(names)
    inside = {path: leaf for path, leaf in flat.items() if path in names}
    return inside, {path: leaf for path, leaf in flat.items() if path not in names}


def merge(*parts: Flat) -> dict:
    """The nested tree whose leaves are in the given flat parts."""
    whole: Flat = {}
    for part in parts:
        whole |= part
    return unflatten(whole)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or array shapes) in a tree."""
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, 'dtype')
    )


def overview(
    params: Mapping, *, train: Iterable[str], l2: Iterable[str] = (), decay: Iterable[str] = ()
) -> str:
    """A table of the parameters: shape, count, bytes, trained or frozen, decayed or not."""
    flat, train, l2, decay = flatten(params), set(train), set(l2), set(decay)
    width = max(map(len, flat))
    lines = [f'{"parameter":<{width}}  {"shape":<18} {"count":>12}  state     decay']
    for path, leaf in flat.items():
        marks = [name for name, group in (('l2', l2), ('weight_decay', decay)) if path in group]
        lines.append(
            f'{path:<{width}}  {"×".join(map(str, leaf.shape)):<18} {leaf.size:>12,}  '
            f'{"trained" if path in train else "frozen":<9} {" ".join(marks)}'.rstrip()
        )
    trained, fixed = partition(params, train)
    for name, part in (('trained', trained), ('frozen', fixed)):
        count = sum(leaf.size for leaf in part.values())
        lines.append(f'{name:<{width}}  {"":<18} {count:>12,}  {nbytes(part) / 1e6:,.2f} MB')
    return '\n'.join(lines)
