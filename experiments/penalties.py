"""Which penalty or constraint on the weights helps when there are few images?

The small net on 500 MNIST digits; each acts on all kernels, orthogonality on the convolutions', at
a strength that is tuned. Adam.

  python -m launch.ablate --config=experiments/penalties.py --workdir=runs/penalties
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config
from experiments import l2_vs_weight_decay
from experiments.baseline import TUNE as TUNE

L1 = {'loss.l1': log(1e-6, 1e-3)}
L2 = {'loss.l2': log(1e-5, 1e-1)}

ARMS = {
    'none': {},
    'L1': L1,
    'L2': L2,
    'elastic': L1 | L2,
    'decoupled decay': {'optimizer.weight_decay': log(1e-2, 10.0)},
    'orthogonality': {'loss.orthogonality': log(1e-4, 1.0)},
    'max-norm': {'optimizer.max_norm': log(0.3, 2.0)},
}


def get_config() -> Config:
    config = l2_vs_weight_decay.get_config()
    config.loss.l1_on = ('*/kernel',)
    return config
