"""Does it matter what lies beyond the image's edge?

SAME pads as TensorFlow does, SAME_TORCH as PyTorch does, both with zeros; REFLECT mirrors,
CIRCULAR wraps; VALID pads nothing, so its images and its classifier are smaller.

  python -m launch.ablate --config=experiments/padding.py --workdir=runs/padding
"""

from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

ARMS = {
    name: {'model.padding': name} for name in ('SAME', 'SAME_TORCH', 'REFLECT', 'CIRCULAR', 'VALID')
}
