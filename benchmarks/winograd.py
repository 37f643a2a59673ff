"""Does Winograd's form of the 3×3 convolutions change what a training comes to? 20 paired replicates.

The small net with batch normalization, dropout and L2 on 500 MNIST digits, trained with direct sums
and with Winograd's form F(4×4, 3×3) of both products' gradients, from the same weights, on the same
images in the same order.

  python -m launch.ablate --config=benchmarks/winograd.py --workdir=runs/winograd
"""

from benchmarks.regularization import ARMS as OF_REGULARIZATION
from cnn_jax.config import Config, replace
from experiments import baseline

SEEDS = 20
FLOOR = False
ARMS = {'direct': {'model.winograd': 'never'}, 'Winograd': {'model.winograd': 'always'}}


def get_config() -> Config:
    changes = {**OF_REGULARIZATION['all'], 'model.widths': (32, 64)}
    return replace(baseline.get_config(), {**changes, 'optimizer.learning_rate': 1e-3})
