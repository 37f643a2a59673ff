"""What is pretraining worth? Frozen VGG16 on 200 handwritten 4s and 9s.

The same head (Flatten → Dense 1024 ReLU → Dropout 0.5 → Dense 1 sigmoid) on the features of
64×64 images; only the convolutions' weights differ: random, drawn anew for each replicate, or
ImageNet's. The learning rate is tuned for both. Each seed draws 200 digits of 400; 200 are held
out, 400 are for testing.

  python -m launch.ablate --config=experiments/finetune_digits.py --workdir=runs/pretraining
  python -m launch.train --config=experiments/finetune_digits.py --workdir=runs/imagenet
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config
from experiments import finetune_vgg16

SEEDS = 10
TUNE = {'optimizer.learning_rate': log(3e-4, 3e-2)}
TRIALS = 4
ARMS = {'random': {'model.weights': 'random'}, 'ImageNet': {}}


def get_config() -> Config:
    config = finetune_vgg16.get_config()
    config.data.source = 'mnist_5k'
    config.data.classes = ('4', '9')
    config.data.train = 'all[:600]'
    config.data.eval = 'all[600:]'
    config.data.subset = 200
    config.data.validation = 200
    config.data.size = 64
    return config
