"""Under Adam, is an L2 penalty the same as decoupled weight decay?

Under plain SGD, λΣw² in the loss equals decay of 2λ; Adam divides the penalty's gradient by its
own size. Both act on the convolutions' kernels here.

  python -m launch.ablate --config=experiments/l2_vs_weight_decay.py --workdir=runs/l2_vs_decay
"""

from cnn_jax.config import Config
from experiments import baseline

ARMS = {
    'neither': {},
    'L2 5e-4': {'loss.l2': 5e-4},
    'L2 5e-3': {'loss.l2': 5e-3},
    'decay 0.1': {'optimizer.weight_decay': 0.1},
    'decay 1': {'optimizer.weight_decay': 1.0},
}


def get_config() -> Config:
    config = baseline.get_config()
    config.optimizer.name = 'adamw'
    config.optimizer.decay_on = config.loss.l2_on
    return config
