"""Set-up of the whole suite: the runtime settings that every launcher applies."""

import os

os.environ.setdefault('KERAS_BACKEND', 'jax')
# Many tests compile the same step: all but the first then find it.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

from hypothesis import settings

from cnn_jax import runtime

runtime.configure()
settings.register_profile('no deadline', deadline=None)  # a busy machine is not a failure
settings.load_profile('no deadline')

# Long files of few tests, which workers would otherwise begin last.
FIRST = ('faults/', 'scale/', 'benchmarks/', 'launch/', 'train/test_loop')


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that no worker ends long after the others."""

    def rank(item):
        path = item.path.as_posix().partition('/tests/')[2]
        return next((i for i, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))

    items.sort(key=rank)
