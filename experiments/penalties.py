"""Which penalty or constraint on the weights helps when there are few images?

The small net on 500 MNIST digits; each acts on the convolutions' kernels. Adam.

  python -m launch.ablate --config=experiments/penalties.py --workdir=runs/penalties
"""

from experiments.l2_vs_weight_decay import get_config as get_config

ARMS = {
    'none': {},
    'L1 1e-4': {'loss.l1': 1e-4},
    'L2 5e-3': {'loss.l2': 5e-3},
    'elastic': {'loss.l1': 1e-4, 'loss.l2': 5e-3},
    'decoupled decay 1': {'optimizer.weight_decay': 1.0},
    'orthogonality 1e-2': {'loss.orthogonality': 1e-2},
    'max-norm 2': {'optimizer.max_norm': 2.0},
}
