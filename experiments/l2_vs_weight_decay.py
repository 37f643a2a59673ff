"""Under Adam, is an L2 penalty the same as decoupled weight decay?

Under plain SGD, λΣw² in the loss equals decay of 2λ; Adam divides the penalty's gradient by its
own size. Both act on all kernels here, their strengths are tuned, and decay is compared with L2.

  python -m launch.ablate --config=experiments/l2_vs_weight_decay.py --workdir=runs/l2_vs_decay
"""

from cnn_jax.ablation import log
from cnn_jax.config import Config
from experiments import baseline
from experiments.baseline import TUNE as TUNE

ARMS = {
    'neither': {},
    'L2': {'loss.l2': log(1e-5, 1e-1)},
    'decay': {'optimizer.weight_decay': log(1e-2, 10.0)},
}
AGAINST = {'decay': 'L2'}


def get_config() -> Config:
    config = baseline.get_config()
    config.optimizer.name = 'adamw'
    config.loss.l2_on = ('*/kernel',)
    return config
