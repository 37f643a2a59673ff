"""Does dropout before the classifier help on 500 images, and at which rates?

The rate is a number that the compiled step takes as an argument: all arms share one compilation.

  python -m launch.ablate --config=experiments/dropout_rate.py --workdir=runs/dropout_rate
"""

from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

ARMS = {f'dropout {rate}': {'model.head_dropout': rate} for rate in (0.0, 0.25, 0.5, 0.75, 0.9)}
