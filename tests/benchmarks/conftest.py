"""A problem that the contenders of the training step solve in a second."""

import numpy as np
import pytest

from benchmarks import workloads
from cnn_jax.config import Config, Data, Loss, Model


@pytest.fixture(scope='session')
def tiny():
    """Two batches of four 12×12 grey images for a net with a stem, a pair and a hidden layer."""
    config = Config(
        model=Model(stem_width=3, stem_kernel=7, widths=(4,), hidden=(8,)),
        data=Data(batch=4),
        loss=Loss(l2=5e-4),
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 12, 12, 1), np.uint8)
    labels = rng.integers(0, 3, (2, 4), np.int32)
    standardize = {'kind': 'standardize', 'mean': [0.5], 'std': [0.29], 'channels': 1}
    return workloads.problem(config, standardize, images, labels, classes=3)
