"""Does a stride of 2 lose anything against pooling?

The second convolution of each pair either strides or is followed by a 2×2 pool; the parameters,
and their initial values, are the same.

  python -m launch.ablate --config=experiments/stride_vs_pool.py --workdir=runs/stride_vs_pool
"""

from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

ARMS = {name: {'model.downsample': name} for name in ('stride', 'max_pool', 'avg_pool')}
