"""Which noise inside the network helps when there are few images?

The small net on 500 MNIST digits without noise, and with each kind at a rate that is tuned: dropped
elements, channels or blocks after each pair, Gaussian factors of the same variance, Gaussian noise
on the images, and branches dropped at random, against a residual net that keeps all of them.

  python -m launch.ablate --config=experiments/noise.py --workdir=runs/noise
"""

from cnn_jax.ablation import linear
from experiments.baseline import TUNE as TUNE
from experiments.baseline import get_config as get_config

RATE = {'model.dropout': linear(0.05, 0.6)}
RESIDUAL = {'model.residual': True}

ARMS = {
    'none': {},
    'elements': RATE,
    'channels': RATE | {'model.drop_kind': 'channel'},
    'blocks': RATE | {'model.drop_kind': 'block', 'model.drop_block': 3, 'model.drop_ramp': 0.5},
    'gaussian': RATE | {'model.drop_kind': 'gaussian'},
    'input noise': {'model.input_noise': linear(0.1, 1.0)},
    'residual': RESIDUAL,
    'stochastic depth': RESIDUAL | {'model.stochastic_depth': linear(0.05, 0.6)},
}
AGAINST = {'stochastic depth': 'residual'}
