"""Which change of the images or of their labels helps when there are few of them?

The small net on 500 MNIST digits, which must not be flipped.

  python -m launch.ablate --config=experiments/augmentation.py --workdir=runs/augmentation
"""

from experiments.baseline import get_config as get_config

ARMS = {
    'none': {},
    'crop': {'augment.crop': 2},
    'rotation': {'augment.rotation': 15.0},
    'cutout': {'augment.cutout': 8},
    'erasing': {'augment.erasing': 0.5},
    'RandAugment': {'augment.randaugment': 9.0},
    'TrivialAugment': {'augment.trivialaugment': 1.0},
    'mixup': {'augment.mixup': 0.2},
    'CutMix': {'augment.cutmix': 1.0},
    'label smoothing': {'loss.label_smoothing': 0.1},
    'confidence penalty': {'loss.confidence_penalty': 0.1},
}
