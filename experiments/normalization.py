"""Which normalization helps a small net that is trained on few images?

The small net on 500 MNIST digits without normalization, and with each kind after the activation;
the head is left without.

  python -m launch.ablate --config=experiments/normalization.py --workdir=runs/normalization
"""

from experiments.baseline import MOMENTUM
from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

GROUP = {'model.norm': 'group', 'model.norm_groups': 8}

ARMS = {
    'none': {},
    'batch': MOMENTUM | {'model.norm': 'batch'},
    'ghost batch of 10': MOMENTUM | {'model.norm': 'ghost', 'model.ghost_batch': 10},
    'batch renormalization': MOMENTUM | {'model.norm': 'renorm'},
    'group': GROUP,
    'layer': {'model.norm': 'layer'},
    'instance': {'model.norm': 'instance'},
    'group, weights standardized': GROUP | {'model.weight_standardization': True},
}
AGAINST = {'group, weights standardized': 'group'}
