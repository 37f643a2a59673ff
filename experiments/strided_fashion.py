"""The strided net on Fashion-MNIST's 60,000 images of 28×28 (IDX files).

The stem has stride 1 here: the net was made for 96 pixels, and 28 are few.

The files are MNIST's format, gzipped or not; Debian and Ubuntu have them as a package:

  apt install dataset-fashion-mnist
  python -m launch.train --config=experiments/strided_fashion.py --workdir=runs/fashion

Accuracy on the 10,000 test images: 0.929 (one run before version 0.1.0, seed 0, 2026-11-24; 22
minutes on two shared cores of a Zen 4 server, jaxlib 0.10.2).
"""

from cnn_jax.config import Augment, Config, Data, Loss, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(stem_stride=1),
        data=Data(source='idx:/usr/share/datasets/fashion-mnist', batch=64),
        augment=Augment(flip=True),
        loss=Loss(l2=1e-5),
        optimizer=Optimizer(learning_rate=2e-3, schedule='cosine', warmup_epochs=1),
        train=Train(epochs=18),
    )
