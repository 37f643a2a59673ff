"""What pretraining is worth: frozen VGG16 on 200 handwritten 4s and 9s, ImageNet or random weights.

The same head (Flatten → Dense 1024 ReLU → Dropout 0.5 → Dense 1 sigmoid) on the features of
64×64 images; only the convolutions' weights differ.

  python -m launch.train --config=experiments/finetune_digits.py --workdir=runs/imagenet
  python -m launch.train --config=experiments/finetune_digits.py --workdir=runs/random \\
      --config.model.weights=random
"""

from cnn_jax.config import Config
from experiments import finetune_vgg16


def get_config() -> Config:
    config = finetune_vgg16.get_config()
    config.data.source = 'mnist_5k'
    config.data.classes = ('4', '9')
    config.data.train = 'train[:200]'
    config.data.size = 64
    return config
