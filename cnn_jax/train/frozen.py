"""Frozen modules run in inference mode."""

from collections.abc import Callable

from cnn_jax import params


def frozen_modules(names: list[str], trainable: list[str], patterns: tuple[str, ...]) -> Callable:
    """A Linen interceptor that runs frozen modules in inference mode, their children included.

    A module is frozen when it has parameters and none of them is trained, or when it has none
    (dropout) and its own path matches a `frozen` pattern. Its batch statistics then neither
    drift nor depend on the batch. It acts on modules called with the keyword `train`.
    """
    trained = set(trainable)

    def is_frozen(path: str) -> bool:
        inside = [name for name in names if name.startswith(f'{path}/')]
        return not trained.intersection(inside) if inside else params.matches(path, patterns)

    def intercept(call, args, kwargs, context):
        path = '/'.join(context.module.path)
        if path and kwargs.get('train') and is_frozen(path):
            kwargs = kwargs | {'train': False}
        return call(*args, **kwargs)

    return intercept
