"""A small strided net on 28×28 digits: the first thing to run.

Conv 32, Conv 32/2, Conv 64, Conv 64/2 (each ReLU, BN), dropout 0.25 after each pair, Dense 128
(ReLU, BN, dropout 0.5); L2 of 5e-4 on the convolutions, random crops of 2 pixels.

  python -m launch.train --config=experiments/small.py --workdir=runs/small
"""

from cnn_jax.config import Augment, Config, Data, Loss, Model, Optimizer, Train


def get_config() -> Config:
    return Config(
        model=Model(stem_width=0, widths=(32, 64), hidden=(128,)),
        data=Data(source='mnist_5k', batch=64),
        augment=Augment(crop=2),
        loss=Loss(l2=5e-4),
        optimizer=Optimizer(learning_rate=2e-3, schedule='cosine', warmup_epochs=1),
        train=Train(epochs=15),
    )
