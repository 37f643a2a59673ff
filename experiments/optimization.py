"""What does the optimizer buy, as a regularizer, when there are few images?

The small net on 500 MNIST digits: weights averaged two ways at a constant rate, sharpness-aware
minimization, noise on the gradient, smaller and larger batches. The epochs are the same for all, so
batches of 25 take twice as many steps, and SAM two gradients a step.

  python -m launch.ablate --config=experiments/optimization.py --workdir=runs/optimization
"""

from cnn_jax.ablation import linear, log
from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

CONSTANT = {'optimizer.schedule': 'constant'}

ARMS = {
    'none': {},
    'constant rate': CONSTANT,
    'EMA': CONSTANT | {'train.ema': linear(0.9, 0.98)},
    'SWA from epoch 10': CONSTANT | {'train.swa_from': 10.0},
    'SAM': {'optimizer.sam': log(0.01, 0.5)},
    'gradient noise': {'optimizer.gradient_noise': log(1e-4, 1e-1)},
    'batch 25': {'data.batch': 25},
    'batch 100': {'data.batch': 100},
}
AGAINST = {'EMA': 'constant rate', 'SWA from epoch 10': 'constant rate'}
