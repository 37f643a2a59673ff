"""Which augmentation of images or labels helps when there are few images?

The small net on 500 MNIST digits; no flips, since a mirrored digit is no digit.

  python -m launch.ablate --config=experiments/augmentation.py --workdir=runs/augmentation
"""

from cnn_jax.ablation import linear, log
from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

ARMS = {
    'none': {},
    'crop': {'augment.crop': 2},
    'rotation': {'augment.rotation': linear(5.0, 30.0)},
    'cutout': {'augment.cutout': 8},
    'erasing': {'augment.erasing': linear(0.1, 0.9)},
    'RandAugment': {'augment.randaugment': linear(3.0, 15.0)},
    'TrivialAugment': {'augment.trivialaugment': 1.0},
    'mixup': {'augment.mixup': log(0.05, 1.0)},
    'CutMix': {'augment.cutmix': log(0.1, 2.0)},
    'label smoothing': {'loss.label_smoothing': linear(0.02, 0.3)},
    'confidence penalty': {'loss.confidence_penalty': log(0.02, 0.5)},
}
