"""The platform that is compiled for: some layers are written otherwise for a CPU."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_chosen = contextvars.ContextVar('platform', default='')


def on_cpu() -> bool:
    """Whether the computation that is traced now will run on a CPU."""
    return (_chosen.get() or jax.default_backend()) == 'cpu'


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace for another platform than this process's, `tpu` or `gpu`, while the context lasts."""
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)
