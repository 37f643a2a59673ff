"""How much of a pretrained VGG16 is worth training when there are 300 images?

A new head on ImageNet's convolutions is trained for 5 epochs, then for 10 more alone or together
with the last block, the last two, or all five, at a tenth of its rate. Ten MNIST digits at 32×32
pixels, 300 drawn of 2,500 by each seed; every arm takes the same steps.

  python -m launch.ablate --config=experiments/finetune_depth.py --workdir=runs/depth
"""

from cnn_jax.config import Config
from experiments import finetune_vgg16

SEEDS = 5
SECOND_PHASE = {'train.epochs': 5.0, 'unfreeze.epochs': 10.0}

ARMS = {
    'head alone': {},
    'and block 5': SECOND_PHASE | {'unfreeze.frozen': ('backbone/block[1-4]*',)},
    'and blocks 4-5': SECOND_PHASE | {'unfreeze.frozen': ('backbone/block[1-3]*',)},
    'and all blocks': SECOND_PHASE | {'unfreeze.frozen': ()},
}


def get_config() -> Config:
    config = finetune_vgg16.get_config()
    config.model.outputs = 0
    config.data.source = 'mnist_5k'
    config.data.train = 'all[:2500]'
    config.data.eval = 'all[2500:]'
    config.data.subset = 300
    config.data.size = 32
    config.train.epochs = 15
    config.unfreeze.learning_rate = config.optimizer.learning_rate / 10
    return config
