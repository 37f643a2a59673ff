"""Freezing: no gradient, no optimizer memory, no update, and inference mode for what is frozen.

`freeze` is for any parameter tree and any training loop. `in_inference` does the rest where
modules have a training mode: the batch statistics of a frozen layer must not drift, and its
dropout must be off. A module that cannot be held still is an error.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import optax

from cnn_jax import params
from cnn_jax.errors import UserError

FROZEN = 'frozen'  # the label of what is frozen
# How modules spell the training mode, and its value in inference.
MODES = {
    'train': False,
    'training': False,
    'is_training': False,
    'deterministic': True,
    'use_running_average': True,
}


def freeze(
    optimizer: optax.GradientTransformation, patterns: str | Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that leaves some parameters as they are.

    What matches has no memory in the optimizer's state, no decay and no update; XLA drops the
    computation of its gradient. It is `optax.partition` with patterns.

    Args:
        optimizer: Any Optax transformation.
        patterns: Shell wildcards over parameter paths, such as `backbone/*`; `*` crosses slashes.

    Returns:
        A transformation for any tree of parameters, e.g. the `tx` of Flax's `TrainState`.

    Errors:
        UserError: When it is initialized: a pattern matches nothing, or all of them everything.

    >>> tx = freeze(optax.adam(1e-3), 'backbone/*')
    >>> weights = {'backbone': {'kernel': jnp.ones(3)}, 'head': {'kernel': jnp.ones(2)}}
    >>> state = tx.init(weights)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, weights), state, weights)
    >>> optax.apply_updates(weights, updates)['backbone']['kernel'].tolist()
    [1.0, 1.0, 1.0]
    """
    wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def labels(tree: Any) -> Any:
        paths = params.paths_of(tree)
        frozen = params.select(paths, wanted, field='freeze')
        if len(frozen) == len(paths):
            raise UserError(f'the patterns {wanted} freeze every parameter; loosen one')
        return params.map_paths(lambda path, _: FROZEN if path in frozen else 'trained', tree)

    return optax.partition({'trained': optimizer, FROZEN: keep()}, labels)


def keep() -> optax.GradientTransformation:
    """The transformation without state whose update changes no bit of a weight.

    The update is −0.0: w + 0.0 would turn a weight of −0.0 into 0.0.
    """
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: -jnp.zeros_like(u), updates))


def frozen_modules(
    names: Iterable[str], trainable: Iterable[str], patterns: Sequence[str]
) -> Callable[[str], bool]:
    """The test that tells from a module's path whether it is frozen.

    It is when it has parameters (of all, `names`) and none of them is trained, or when it has none
    (dropout) and its own path matches a pattern.
    """
    names, trained = list(names), set(trainable)

    def is_frozen(path: str) -> bool:
        inside = [name for name in names if name.startswith(f'{path}/')]
        return not trained.intersection(inside) if inside else params.matches(path, patterns)

    return is_frozen


def in_inference(
    names: Iterable[str], trainable: Iterable[str], patterns: Sequence[str]
) -> Callable:
    """A Linen interceptor that runs frozen modules in inference mode, their children included.

    They may call the mode `train`, `training`, `is_training`, `deterministic` or
    `use_running_average`, as an argument or as an attribute. Arguments as of `frozen_modules`.

    Errors:
        UserError: When a frozen module draws random numbers all the same.

    >>> interceptor = in_inference(['norm/scale', 'head/kernel'], ['head/kernel'], ['norm/*'])
    >>> with flax.linen.intercept_methods(interceptor):
    ...     pass  # model.apply(variables, x, train=True, mutable=['batch_stats'])
    """
    is_frozen = frozen_modules(names, trainable, patterns)

    def intercept(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, '/'.join(context.module.path)
        if not path or context.method_name == 'setup' or not is_frozen(path):
            return call(*args, **kwargs)
        args, kwargs = _call_in_inference(context, args, kwargs)
        attributes = {
            name: getattr(module, name)
            for name in MODES
            if name in module.__dataclass_fields__ and getattr(module, name) is not None
        }
        rngs, module.scope.rngs = module.scope.rngs, {}
        for name in attributes:
            object.__setattr__(module, name, MODES[name])
        try:
            return call(*args, **kwargs)
        except flax.errors.InvalidRngError as error:
            raise UserError(
                f'{path} is frozen but draws random numbers in training, and has no argument '
                f'({", ".join(MODES)}) that stops it; give it one, or train it'
            ) from error
        finally:
            module.scope.rngs = rngs
            for name, value in attributes.items():
                object.__setattr__(module, name, value)

    return intercept


def without_memory(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """A Linen interceptor after which running averages of statistics are the batch's own."""
    module = context.module
    if 'momentum' not in module.__dataclass_fields__ or context.method_name == 'setup':
        return call(*args, **kwargs)
    momentum = module.momentum
    object.__setattr__(module, 'momentum', 0.0)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, 'momentum', momentum)


def _call_in_inference(context: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call with the training mode, if it has one, switched off."""
    method = getattr(type(context.module), context.method_name, None)
    if method is None:  # a function that a Flax transformation calls; the module's own follows
        return args, kwargs
    parameters = inspect.signature(method).parameters
    args, kwargs, known = list(args), dict(kwargs), list(parameters)[1:]
    for name, value in MODES.items():
        if name in kwargs:
            kwargs[name] = value if kwargs[name] is not None else None
        elif name in known[: len(args)]:
            place = known.index(name)
            args[place] = value if args[place] is not None else None
        elif name in known and isinstance(parameters[name].default, bool):
            kwargs[name] = value
    return args, kwargs


def mode_arguments(module: Any, train: bool) -> dict[str, bool]:
    """The keyword arguments that put a Linen module into training mode, or into inference.

    >>> mode_arguments(flax.linen.BatchNorm(), train=True)
    {'use_running_average': False}
    """
    known = inspect.signature(type(module).__call__).parameters
    modes = [name for name in known if re.search('train|infer|determin|eval', name)]
    if modes and not MODES.keys() & set(known):
        raise UserError(
            f'{type(module).__name__} is called with {modes[0]}, which does not name the training '
            f'mode that is known here; call it {", ".join(MODES)}'
        )
    return {name: value != train for name, value in MODES.items() if name in known}


def check_statistics(jaxpr: Any, before: Any, is_frozen: Callable[[str], bool]) -> None:
    """Check that a training pass leaves the statistics of frozen modules alone.

    The jaxpr is of a pass whose first arguments, and first results, are the batch statistics, of
    shapes `before`.
    """
    # A statistic that is left alone is one and the same variable before and after.
    for path, old, new in zip(params.paths_of(before), jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars):
        module, _, name = path.rpartition('/')
        if new is not old and is_frozen(module):
            raise UserError(
                f'{module} is frozen, but its {name} would change in training; give it an '
                f'argument ({", ".join(MODES)}) that stops it, or train it'
            )
