"""Fields of a configuration that know what they may hold, and access to them by dotted path.

A configuration is a dataclass whose fields are such fields or further dataclasses (its groups),
each with a default.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import field
from operator import attrgetter
from typing import Any, TypeVar, get_args, get_origin

from cnn_jax.errors import UserError

C = TypeVar('C')


def choice(default: Any, *others: Any) -> Any:
    """One of the listed."""
    return field(default=default, metadata={'choices': (default, *others)})


def number(default: Any, *, low: float = 0, high: float = math.inf) -> Any:
    """A number from `low` to `high`, both included, or a tuple of such numbers."""
    return field(default=default, metadata={'range': (low, high)})


def value(default: float, *, low: float = 0, high: float = math.inf) -> Any:
    """A number that a compiled step takes as an argument instead of baking it in."""
    return field(default=default, metadata={'range': (low, high), 'value': True})


def switched(default: float, *, low: float = 0, high: float = math.inf) -> Any:
    """A value of which it is structure all the same whether it is 0: what is off costs nothing."""
    return field(default=default, metadata={'range': (low, high), 'value': True, 'switch': True})


def fields_by_path(config: Any, prefix: str = '') -> dict[str, dataclasses.Field]:
    """Every leaf field of a configuration (or of one of its groups), by its dotted path."""
    found = {}
    for f in dataclasses.fields(config):
        inner = getattr(config, f.name)
        if dataclasses.is_dataclass(inner):
            found |= fields_by_path(inner, f'{prefix}{f.name}.')
        else:
            found[prefix + f.name] = f
    return found


def get(config: Any, path: str) -> Any:
    """The value at a dotted path; an unknown path is a `UserError` naming the nearest one."""
    known = fields_by_path(config)
    if path not in known:
        raise UserError(unknown_key(path, known))
    return attrgetter(path)(config)


def to_flat(config: Any) -> dict[str, Any]:
    """The configuration as `{dotted path: value}`."""
    return {path: attrgetter(path)(config) for path in fields_by_path(config)}


def replace(config: C, changes: dict[str, Any]) -> C:
    """A copy of a configuration with the fields at the given dotted paths changed.

    Errors:
        UserError: A path is unknown, or a value is not of its field's type.
    """
    known = fields_by_path(config)
    new = type(config)()
    for path, given in (to_flat(config) | changes).items():
        if path not in known:
            raise UserError(unknown_key(path, known))
        group, _, name = path.rpartition('.')
        owner = attrgetter(group)(new) if group else new
        setattr(owner, name, _coerced(path, known[path].type, given))
    return new


def unknown_key(path: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(path, list(known), n=1, cutoff=0.0)
    hint = f'; did you mean config.{near[0]}?' if near else ''
    return f'config.{path} is not a field of the configuration{hint}'


def check(config: Any) -> None:
    """Compare every field with its choices or its range; the first that fails is a `UserError`."""
    for path, f in fields_by_path(config).items():
        given = attrgetter(path)(config)
        if 'choices' in f.metadata and given not in f.metadata['choices']:
            choices = [str(each) for each in f.metadata['choices']]
            near = difflib.get_close_matches(str(given), choices, n=1)
            hint = f'; did you mean {near[0]}?' if near else ''
            raise UserError(f'config.{path} is {given!r}; it can be {", ".join(choices)}{hint}')
        if 'range' in f.metadata:
            low, high = f.metadata['range']
            for each in given if isinstance(given, tuple) else (given,):
                if not math.isfinite(each):
                    raise UserError(f'config.{path} is {given}; it must be finite')
                if not low <= each <= high:
                    wanted = f'at least {low}' if high == math.inf else f'from {low} to {high}'
                    raise UserError(f'config.{path} is {given}; it must be {wanted}')


def _coerced(path: str, kind: Any, given: Any) -> Any:
    """`given` as the field's type, or a `UserError`; a traced array passes as a number."""
    if hasattr(given, 'dtype') and kind in (int, float):
        return given
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(given, (list, tuple)):
            return tuple(_coerced(path, item, g) for g in given)
    elif kind is float:
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return float(given)
    elif isinstance(given, kind) and not (kind is int and isinstance(given, bool)):
        return given
    items = get_args(kind)
    name = f'a list of {items[0].__name__}' if items else kind.__name__
    raise UserError(f'config.{path} must be {name}, not {given!r}')
