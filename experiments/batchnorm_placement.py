"""Does batch normalization belong before or after the activation?

python -m launch.ablate --config=experiments/batchnorm_placement.py --workdir=runs/placement
"""

from experiments.baseline import BATCH_NORM
from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

ARMS = {
    'after': BATCH_NORM | {'model.norm_position': 'after'},
    'before': BATCH_NORM | {'model.norm_position': 'before'},
    'none': {},
}
