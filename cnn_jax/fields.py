"""Fields that say themselves what they may hold; access to them by dotted path, and from text.

*Traced* fields enter the compiled step as arguments, so runs that differ only in them share one
compilation; of an *optional* one it is static whether it is 0, so that what is off costs nothing.
"""

import ast
import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, TypeVar, get_args

from cnn_jax.errors import UserError, nearest

C = TypeVar('C')
LARGEST = 3.4e38  # what float32 holds
OWN = 'own'  # the name of a model, source or optimizer that the user brings
TRUE, FALSE = ('true', 't', '1'), ('false', 'f', '0')
BOOLS: dict[str, bool] = dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)
KINDS = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'a text',
    tuple[int, ...]: 'a list of whole numbers',
    tuple[float, ...]: 'a list of numbers',
    tuple[str, ...]: 'a list of texts',
}


def setting(default: Any, **facts: Any) -> Any:
    """A field with facts about it.

    These are what the functions below set; `only_for`, those of `model.name` that read the field;
    `noiseless`, the value under which the network adds no noise to what it computes (or a table of
    such values); `kept`, whether it is read although the user brings the model or the optimizer;
    `before`, the default of earlier versions, which counts as today's.
    """
    return dataclasses.field(default=default, metadata=facts)


def choice(default: Any, *others: Any, **facts: Any) -> Any:
    """One of the listed values."""
    return setting(default, choices=(default, *others), **facts)


def number(default: Any, *, low: float = 0, high: float = LARGEST, **facts: Any) -> Any:
    """A number from `low` to `high`, both included, or a tuple of such numbers."""
    return setting(default, range=(low, high), **facts)


def traced(default: float, **facts: Any) -> Any:
    """A number that a compiled step takes as an argument instead of baking it in."""
    return number(default, traced=True, **facts)


def optional(default: float, **facts: Any) -> Any:
    """A traced number; whether it is 0 is static, so it costs nothing when off."""
    return traced(default, optional=True, **facts)


def needs(*others: str, of: Any = bool) -> dict[str, Any]:
    """The fact that a field is read only where one of these others has a value `of` this kind.

    `of` are the values, or a function that tells them; by default any but 0, '' and ().
    """
    return {'needs': {other: of.__contains__ if isinstance(of, tuple) else of for other in others}}


class Fields:
    """A group of fields, in which a misspelt one cannot be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = [f.name for f in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        if name not in known:
            raise UserError(f'{type(self).__name__} has no field {name}{nearest(name, known)}')
        super().__setattr__(name, value)


def fields_by_path(config: Any, prefix: str = '') -> dict[str, dataclasses.Field]:
    """The leaf fields of a configuration (or of one of its groups), by dotted path."""
    leaves = {}
    for f in dataclasses.fields(config):
        inner = getattr(config, f.name)
        if dataclasses.is_dataclass(inner):
            leaves |= fields_by_path(inner, f'{prefix}{f.name}.')
        else:
            leaves[prefix + f.name] = f
    return leaves


def field_at(config: Any, path: str) -> dataclasses.Field:
    """The field at a dotted path; an unknown path is a `UserError` with a near one."""
    known = fields_by_path(config)
    if path in known:
        return known[path]
    group, _, name = path.rpartition('.')
    inside = [other for other in known if other.rpartition('.')[0] == group]
    leaves = {other.rpartition('.')[2]: f'config.{other}' for other in [*known][::-1] + inside}
    hint = nearest(name, leaves) or '; cnn_jax/config.py lists them'
    raise UserError(f'config.{path} is not a field of the configuration{hint}')


def get(config: Any, path: str) -> Any:
    """Return the value at a dotted path; errors as of `field_at`."""
    field_at(config, path)
    return attrgetter(path)(config)


def to_flat(config: Any) -> dict[str, Any]:
    """Return the configuration as `{dotted path: value}`."""
    return {path: attrgetter(path)(config) for path in fields_by_path(config)}


def replace(config: C, changes: dict[str, Any]) -> C:
    """Return a copy with the fields at these dotted paths changed; UserError if of another type."""
    new = type(config)()
    known = fields_by_path(new)
    for path, value in (to_flat(config) | changes).items():
        kind = (known.get(path) or field_at(new, path)).type
        group, _, name = path.rpartition('.')
        try:
            setattr(attrgetter(group)(new) if group else new, name, _coerce(kind, value))
        except TypeError as error:
            raise UserError(f'config.{path} must be {KINDS[kind]}, not {value!r}') from error
    return new


def from_text(path: str, kind: Any, text: str) -> Any:
    """The value of a field of some type that a command line gives as text, or a UserError.

    For example `0.5`, `true`, `32,64`, `(32, 64)`, `a,b` or `('a,b',)`.
    """
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if kind == tuple[str, ...] and not set(text) & set('\'"'):
            text = repr([each.strip() for each in text.strip('()[] ').split(',') if each.strip()])
        with warnings.catch_warnings(action='ignore'):  # of Python, on odd literals
            value = ast.literal_eval(text.strip())
        return _coerce(kind, value if isinstance(value, (list, tuple)) else (value,))
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f'config.{path} must be {KINDS[kind]}, not {text!r}') from error


def _coerce(kind: Any, value: Any) -> Any:
    """Return the value as a field's type, or raise a TypeError; a traced array is a number."""
    if get_args(kind) and isinstance(value, (list, tuple)):
        return tuple(_coerce(get_args(kind)[0], each) for each in value)
    if hasattr(value, 'dtype') and kind in (int, float):
        return value
    if kind is float and type(value) is int:
        return float(value) if abs(value) <= LARGEST else math.inf
    if get_args(kind) or not isinstance(value, kind) or (type(value) is bool and kind is int):
        raise TypeError(kind)
    return value


def traced_values(config: Any) -> dict[str, float]:
    """The fields that enter the compiled step as arguments, `{dotted path: number}`.

    >>> traced_values(Config())['optimizer.learning_rate']
    0.0001
    """
    fields = fields_by_path(config)
    return {p: v for p, v in to_flat(config).items() if fields[p].metadata.get('traced')}


def bind(config: C, values: dict[str, Any]) -> C:
    """Return the config with (perhaps traced) numbers in it, `{dotted path: number}`.

    Code inside a compiled step takes this one object: `is_on` tells which optional parts are
    compiled in (those that are 0 in `config` stay 0.0), and the numbers are arguments.
    """
    fields, flat = fields_by_path(config), to_flat(config)
    off = {path for path, f in fields.items() if f.metadata.get('optional') and not flat[path]}
    return replace(config, {path: v for path, v in values.items() if path not in off})


def is_on(value: Any) -> bool:
    """Return whether an optional field of a bound config is compiled in: it is traced, or not 0."""
    return not (isinstance(value, (int, float)) and value == 0)


def without_noise(config: Any) -> dict[str, Any]:
    """Return the changes under which the network in training computes without any noise.

    Batch statistics are then of the whole batch, and each layer sees what it sees in inference.
    """
    changes = {path: f.metadata.get('noiseless') for path, f in fields_by_path(config).items()}
    changes |= {p: v.get(get(config, p)) for p, v in changes.items() if isinstance(v, dict)}
    return {path: value for path, value in changes.items() if value is not None}


def structure(config: Any) -> dict[str, Any]:
    """The fields that determine the compiled program, `{dotted path: value}`.

    These are all but the seed and the traced fields; an optional field that is on contributes True.
    """
    flat, fields = to_flat(config), fields_by_path(config)
    fixed = {p: v for p, v in flat.items() if p != 'seed' and not fields[p].metadata.get('traced')}
    on = {p: True for p, v in flat.items() if v and fields[p].metadata.get('optional')}
    return fixed | on


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, `{dotted path: (old, new)}`."""
    a, b, fields = to_flat(old), to_flat(new), fields_by_path(old)
    return {p: (a[p], b[p]) for p in a if is_other(fields[p], a[p], b[p])}


def is_other(f: dataclasses.Field, a: Any, b: Any) -> bool:
    """Return whether two values of a field differ, other than as its default and `before`."""
    return a != b and {a, b} != {f.default, f.metadata.get('before')}


def to_json(config: Any) -> str:
    """Return the config as indented JSON with sorted keys, ending in a newline."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + '\n'


def leaves(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, with their dotted paths."""
    for name, inner in tree.items():
        if isinstance(inner, dict):
            yield from leaves(inner, f'{prefix}{name}.')
        else:
            yield prefix + name, inner


def content_hash(config: Any) -> str:
    """SHA-256 of the fields that differ from their defaults: equal configs, equal hash.

    A field that a later version adds leaves the hashes of earlier runs as they are.
    """
    changed = {path: value for path, (_, value) in differences(type(config)(), config).items()}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
