"""Does dropout help a residual net? A network and images that this file brings itself.

The code of `model` and `source` is part of a run's identity: change it, and the run is another.

  python -m launch.ablate --config=experiments/own_resnet.py --workdir=runs/own_resnet
"""

import flax.linen as nn
import numpy as np

from cnn_jax.config import Config, Data, Model, Optimizer, Train
from cnn_jax.nn import BatchNorm, Conv, Dropout


class ResNet(nn.Module):
    """A stem and three residual blocks of two convolutions (He et al. 2016)."""

    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.relu(BatchNorm()(Conv(16, 3)(x), train=train))
        for width in (16, 32, 64):
            stride = 1 if width == 16 else 2
            y = nn.relu(BatchNorm()(Conv(width, 3, stride)(x), train=train))
            y = BatchNorm()(Conv(width, 3)(y), train=train)
            shortcut = x if width == 16 else Conv(width, 1, stride)(x)
            x = nn.relu(y + shortcut)
        x = Dropout(self.dropout)(x.mean(axis=(1, 2)), train=train)
        return nn.Dense(self.classes)(x)


def model(config, num_classes):
    return ResNet(num_classes, config.model.head_dropout)


def source(config, split):
    """Noisy stripes, along rows or columns: 8-bit images [n, 16, 16, 1], labels, class names."""
    n, rng = (
        (200, np.random.default_rng(0)) if split == 'train' else (1000, np.random.default_rng(1))
    )
    labels, phase = rng.integers(0, 2, n), rng.uniform(0, 6, (n, 1, 1))
    stripes = np.sin(np.arange(16)[None, None] * rng.uniform(0.5, 2, (n, 1, 1)) + phase)
    images = np.where(labels[:, None, None], stripes, stripes.transpose(0, 2, 1))
    noisy = 128 + 30 * images + rng.normal(0, 45, (n, 16, 16))
    return np.clip(noisy, 0, 255).astype(np.uint8)[..., None], labels, ('rows', 'columns')


def get_config() -> Config:
    return Config(
        model=Model(head_dropout=0.0),
        data=Data(batch=20),
        optimizer=Optimizer(learning_rate=3e-3, schedule='cosine'),
        train=Train(epochs=10),
    )


ARMS = {
    'none': {},
    'dropout 0.2': {'model.head_dropout': 0.2},
    'dropout 0.5': {'model.head_dropout': 0.5},
}
