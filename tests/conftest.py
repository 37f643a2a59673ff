"""Set-up of the whole suite: the runtime settings that every launcher applies."""

import os

os.environ.setdefault('KERAS_BACKEND', 'jax')

from cnn_jax import runtime

runtime.prepare()
