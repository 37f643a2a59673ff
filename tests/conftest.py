"""Set-up of the whole suite: the runtime settings that every launcher applies."""

import os

os.environ.setdefault('KERAS_BACKEND', 'jax')
# Many tests compile the same step: all but the first then find it.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

from cnn_jax import runtime

runtime.prepare()
