"""What does each regularizer buy when there are few images?

The small net on 500 MNIST digits: without any, with dropout (0.25 after each pair, 0.5 before the
classifier), with batch normalization, with L2, with all. The rate of each arm and the strength of
L2 are tuned.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config
from experiments import baseline
from experiments.baseline import BATCH_NORM
from experiments.baseline import TUNE as TUNE

TRIALS = 7

DROPOUT = {'model.dropout': 0.25, 'model.head_dropout': 0.5}
L2 = {'loss.l2': log(1e-5, 1e-2)}

ARMS = {
    'none': {},
    'dropout': DROPOUT,
    'batch norm': BATCH_NORM,
    'L2': L2,
    'all': DROPOUT | BATCH_NORM | L2,
}


def get_config() -> Config:
    config = baseline.get_config()
    config.loss.l2_on = ('*/kernel',)
    return config
