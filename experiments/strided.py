"""The strided net: every max-pool of a VGG-like net replaced by a convolution of stride 2.

Conv 16 7×7/2 VALID; for 32, 64, 128 filters: Conv 3×3, ReLU, BN, Conv 3×3/2, ReLU, BN,
dropout 0.25; Dense 512, ReLU, BN, dropout 0.5; softmax. L2 5e-4 on the convolutions' kernels,
Adam 1e-4 with inverse-time decay, batch 32. Made for 96×96×3 photographs: put them into one
folder per class.

  python -m launch.train --config=experiments/strided.py --workdir=runs/strided \\
      --config.data.source=folder:PATH
"""

from cnn_jax.config import Config, Data, Loss, Optimizer, Train


def get_config() -> Config:
    return Config(
        data=Data(source='folder:photos', resize='crop', size=96, channels=3),
        loss=Loss(l2=5e-4),
        optimizer=Optimizer(
            learning_rate=1e-4, schedule='inverse_time', decay_rate=1e-4, decay_steps=1
        ),
        train=Train(epochs=50),
    )
