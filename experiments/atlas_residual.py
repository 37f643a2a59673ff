"""Which regularizer helps a residual net with batch normalization? As `atlas.py`, another net.

500 steps on 1,000 images; every rate and strength is tuned. The control, "none", has batch norm,
and every arm but "no norm" adds to it.

  apt install dataset-fashion-mnist
  python -m launch.ablate --config=experiments/atlas_residual.py --workdir=runs/atlas_residual
"""

from cnn_jax.ablation import linear
from cnn_jax.config import Config, replace
from experiments import atlas
from experiments.baseline import MOMENTUM
from experiments.baseline import TUNE as TUNE

ARMS = {name: arm for name, arm in atlas.ARMS.items() if name not in ('batch norm', 'group norm')}
ARMS |= {
    'stochastic depth': {'model.stochastic_depth': linear(0.05, 0.5)},
    'no norm': {'model.norm': 'none'},
}


def get_config() -> Config:
    net = {'model.residual': True, 'model.norm': 'batch'} | MOMENTUM
    return replace(atlas.get_config(), net)
