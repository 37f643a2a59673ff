"""What does each regularizer buy when there are few images?

The small net on 500 MNIST digits, 50 of each: without any, with dropout (0.25 after each pair,
0.5 before the classifier), with batch normalization, with L2 5e-4 on the convolutions, with all.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
"""

from experiments.baseline import get_config as get_config

DROPOUT = {'model.dropout': 0.25, 'model.head_dropout': 0.5}
BATCH_NORM = {'model.norm': 'batch', 'model.head_norm': 'batch'}
L2 = {'loss.l2': 5e-4}

ARMS = {
    'none': {},
    'dropout': DROPOUT,
    'batch norm': BATCH_NORM,
    'L2': L2,
    'all': DROPOUT | BATCH_NORM | L2,
}
