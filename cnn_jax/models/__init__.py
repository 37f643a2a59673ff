"""Networks, assembled from the layers of `cnn_jax.nn`."""
