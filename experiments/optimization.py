"""What does the optimizer buy, as a regularizer, when there are few images?

The small net on 500 MNIST digits: weights averaged two ways, sharpness-aware minimization, noise on
the gradient, smaller and larger batches, other learning rates. The epochs are the same for all, so
batches of 25 take twice as many steps, and SAM two gradients a step.

  python -m launch.ablate --config=experiments/optimization.py --workdir=runs/optimization
"""

from experiments.baseline import get_config as get_config

ARMS = {
    'none': {},
    'EMA 0.95': {'train.ema': 0.95},
    'SWA from epoch 10': {'train.swa_from': 10.0},
    'SAM 0.05': {'optimizer.sam': 0.05},
    'gradient noise 0.01': {'optimizer.gradient_noise': 0.01},
    'batch 25': {'data.batch': 25},
    'batch 100': {'data.batch': 100},
    'learning rate 3e-4': {'optimizer.learning_rate': 3e-4},
    'learning rate 3e-3': {'optimizer.learning_rate': 3e-3},
}
