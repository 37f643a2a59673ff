"""Which noise inside the network helps when there are few images?

The small net on 500 MNIST digits without noise, and with each kind at a usual rate: dropped
elements, channels or blocks after each pair, Gaussian factors of the same variance, Gaussian noise
on the images, and branches dropped at random, against a residual net that keeps all of them.

  python -m launch.ablate --config=experiments/noise.py --workdir=runs/noise
"""

from experiments.baseline import get_config as get_config

RATE = {'model.dropout': 0.25}

ARMS = {
    'none': {},
    'elements': RATE,
    'channels': RATE | {'model.drop_kind': 'channel'},
    'blocks': RATE | {'model.drop_kind': 'block', 'model.drop_block': 3, 'model.drop_ramp': 0.5},
    'gaussian': RATE | {'model.drop_kind': 'gaussian'},
    'input noise': {'model.input_noise': 0.3},
    'residual': {'model.residual': True},
    'residual, stochastic depth': {'model.residual': True, 'model.stochastic_depth': 0.3},
}
