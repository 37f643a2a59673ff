"""What `python launch/NAME.py` finds in place of this folder."""

import cnn_jax as cnn_jax
