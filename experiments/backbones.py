"""Which backbone transfers better: VGG16 or EfficientNet-Lite0?

A linear classifier on the scaled mean of each channel of the last features, ImageNet's weights
frozen: 512 features by 15 million parameters, or 1,280 by 3.4 million. Learning rate and L2 are
tuned for both. Ten MNIST digits at 64×64 pixels, of which each seed draws 300 of 2,500; 500 are
held out to tune on.

  python -m launch.ablate --config=experiments/backbones.py --workdir=runs/backbones

On your own photographs:

  python -m launch.ablate --config=experiments/backbones.py --workdir=runs/mine \\
      --config.data.source=folder:photos --config.data.train=train --config.data.eval=test \\
      --config.data.subset=0 --config.data.validation=50 --config.data.size=224
"""

from cnn_jax.config import Config
from experiments import finetune
from experiments.finetune import TUNE as TUNE

SEEDS = 5
TRIALS = 4
ARMS = {'VGG16': {}, 'EfficientNet-Lite0': {'model.name': 'efficientnet_lite0'}}


def get_config() -> Config:
    config = finetune.get_config()
    config.data.source = 'mnist_5k'
    config.data.train = 'all[:3000]'
    config.data.eval = 'all[3000:]'
    config.data.subset = 300
    config.data.validation = 500
    config.data.validation_share = 0.0
    config.data.size = 64
    config.train.trials = 0  # the ablation tunes
    config.train.epochs = 20
    return config
