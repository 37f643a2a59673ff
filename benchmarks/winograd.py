"""Does Winograd's form of 3×3 convolutions change what training comes to? 20 paired replicates.

The small net with batch normalization, dropout and L2 on 500 MNIST digits, trained with direct sums
and with Winograd's form F(4×4, 3×3) of all three products, from the same weights, on the same
images in the same order.

No: accuracy differs by 0.00 points (−0.2 to 0.2), negative log-likelihood by 0.0003 nats (−0.003 to
0.004). Measured on 2026-11-30 on two Zen 5 cores.

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
