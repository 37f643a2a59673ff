"""Which backbone transfers better: VGG16 or EfficientNet-Lite0?

A linear classifier on the mean of each channel of the last features, ImageNet's weights frozen;
512 features of 15 million parameters, or 1,280 of 3.4 million. The learning rate is tuned for
both. Ten MNIST digits at 64×64 pixels, of which each seed draws 300 of 2,500; 500 are held out to
tune on. On your own photographs:

  python -m launch.ablate --config=experiments/backbones.py --workdir=runs/backbones
  python -m launch.ablate --config=experiments/backbones.py --workdir=runs/mine \\
      --config.data.source=folder:photos --config.data.train=train --config.data.eval=test \\
      --config.data.subset=0 --config.data.validation=50 --config.data.size=224
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config, Optimizer
from experiments import finetune_vgg16

SEEDS = 5
TUNE = {'optimizer.learning_rate': log(1e-4, 1e-1)}
TRIALS = 4
ARMS = {'VGG16': {}, 'EfficientNet-Lite0': {'model.name': 'efficientnet_lite0'}}


def get_config() -> Config:
    config = finetune_vgg16.get_config()
    config.model.outputs = 0
    config.model.pool = 'average'
    config.model.hidden, config.model.head_norm = (), 'batch'  # the default: there is no norm
    config.optimizer = Optimizer(name='adam')
    config.data.source = 'mnist_5k'
    config.data.train = 'all[:3000]'
    config.data.eval = 'all[3000:]'
    config.data.subset = 300
    config.data.validation = 500
    config.data.size = 64
    config.train.epochs = 20
    return config
