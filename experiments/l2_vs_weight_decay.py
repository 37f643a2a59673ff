"""Under Adam, is an L2 penalty the same as decoupled weight decay?

Under plain SGD, λΣw² in the loss equals decay of 2λ; Adam divides the penalty's gradient by its
own size. Both act on the convolutions' kernels here.

  python -m launch.ablate --config=experiments/l2_vs_weight_decay.py --workdir=runs/l2_vs_decay

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, about 3 minutes; accuracy against `neither`, which has 89.8%, in points, 95% CI): L2 5e-4
−0.1 (−0.7 to 0.5), L2 5e-3 0.0 (−0.4 to 0.3), decay 0.1 −0.1 (−0.4 to 0.3), decay 1 +0.1 (−0.3 to
0.5), all p = 1.00 corrected: over 200 steps neither changes the accuracy by more than 0.7 points.
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
