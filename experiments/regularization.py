"""What does each regularizer buy when there are few images?

The small net on 500 MNIST digits, 50 of each: without any, with dropout (0.25 after each pair,
0.5 before the classifier), with batch normalization, with L2 5e-4 on the convolutions, with all.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization

Answer (n = 5 seeds, 20 epochs = 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4
server, jaxlib 0.10.2, about 4 minutes; accuracy against `none`, points, 95% CI, Holm-corrected p):
dropout +0.7 (0.1 to 1.3, p = 0.058, inconclusive), batch norm −2.6 (−4.2 to −1.1, p = 0.026), L2
+0.1 (−0.3 to 0.5, p = 0.70, inconclusive), all −2.2 (−3.3 to −1.1, p = 0.020). In so short a
training batch normalization costs accuracy.
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
