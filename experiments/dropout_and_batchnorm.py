"""Does dropout still help beside batch normalization?

A grid of both: the effect of each over the levels of the other, and their interaction (Li et al.
2018, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift").

  python -m launch.ablate --config=experiments/dropout_and_batchnorm.py --workdir=runs/grid
"""

from experiments.baseline import BATCH_NORM
from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

FACTORS = {
    'dropout': {'no dropout': {}, 'dropout': {'model.dropout': 0.25, 'model.head_dropout': 0.5}},
    'norm': {'no norm': {}, 'batch norm': BATCH_NORM},
}
