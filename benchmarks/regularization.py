"""The ablation that `benchmarks.ablation` times: fixed rates and strengths, as a peer's script.

python -m launch.ablate --config=benchmarks/regularization.py --workdir=runs/benchmark --curves
"""

from cnn_jax.config import Config, Data
from experiments import baseline

FLOOR = False
DROPOUT = {'model.dropout': 0.25, 'model.head_dropout': 0.5}
L2 = {'loss.l2': 5e-4}

ARMS = {
    'none': {},
    'dropout': DROPOUT,
    'batch norm': baseline.BATCH_NORM,
    'L2': L2,
    'all': DROPOUT | baseline.BATCH_NORM | L2,
}


def get_config() -> Config:
    config = baseline.get_config()
    config.model.widths = (32, 64)
    config.data = Data(source='mnist_5k', train='train[:500]', batch=50, eval_batch=250)
    config.optimizer.learning_rate = 1e-3
    return config
