"""Which regularizer helps at how many images? Fifteen of the toolbox and none, on Fashion-MNIST.

The small net; rates and strengths are tuned. 500 steps at each size. The kept answers took 1.0 to
2.1 core-hours each:

  apt install dataset-fashion-mnist
  for n in 200 1000 5000; do
    python -m launch.ablate --config=experiments/atlas.py --workdir=runs/atlas_$n \\
        --until=decided --config.data.subset=$n --config.train.epochs=$((25000 / n))
  done
  python -m launch.compare --out=atlas.png runs/atlas_200 runs/atlas_1000 runs/atlas_5000
"""

from cnn_jax.ablation import linear, log
from cnn_jax.config import Config
from experiments import baseline
from experiments.baseline import MOMENTUM
from experiments.baseline import TUNE as TUNE

ARMS = {
    'none': {},
    'dropout': {'model.dropout': linear(0.05, 0.5)},
    'dropped channels': {'model.dropout': linear(0.05, 0.5), 'model.drop_kind': 'channel'},
    'dropout before the classifier': {'model.head_dropout': linear(0.1, 0.8)},
    'batch norm': MOMENTUM | {'model.norm': 'batch'},
    'group norm': {'model.norm': 'group', 'model.norm_groups': 8},
    'L1': {'loss.l1': log(1e-6, 1e-3)},
    'L2': {'loss.l2': log(1e-5, 1e-1)},
    'max-norm': {'optimizer.max_norm': log(0.3, 2.0)},
    'label smoothing': {'loss.label_smoothing': linear(0.02, 0.3)},
    'crop': {'augment.crop': 2},
    'flip': {'augment.flip': True},
    'erasing': {'augment.erasing': linear(0.1, 0.9)},
    'RandAugment': {'augment.randaugment': linear(3.0, 15.0)},
    'mixup': {'augment.mixup': log(0.05, 1.0)},
    'SAM': {'optimizer.sam': log(0.01, 0.5)},
}


def get_config() -> Config:
    config = baseline.get_config()
    config.data.source = 'idx:/usr/share/datasets/fashion-mnist'
    config.data.train, config.data.eval = 'train', 'test'
    config.data.subset, config.data.validation = 1000, 1000
    config.train.epochs = 25
    config.loss.l1_on = config.loss.l2_on = ('*/kernel',)
    return config
