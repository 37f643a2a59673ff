"""Which penalty or constraint on the weights helps when there are few images?

The small net on 500 MNIST digits; each acts on the convolutions' kernels. Adam.

  python -m launch.ablate --config=experiments/penalties.py --workdir=runs/penalties

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-25, two cores of an Intel Xeon server,
jaxlib 0.10.2; accuracy against none, which has 89.8%, in points, 95% CI, Holm-corrected p): L1 1e-4
−0.2 (−0.5 to 0.1, p = 0.85), L2 5e-3 0.0 (−0.4 to 0.4, p = 1.00), elastic −0.2 (−0.8 to 0.5, p =
1.00), decoupled decay 1 0.0 (−0.5 to 0.5, p = 1.00), orthogonality 1e-2 +0.1 (−0.1 to 0.4, p =
1.00), max-norm 2 −0.1 (−0.5 to 0.2, p = 1.00). None changes the digits' accuracy by a point either
way.

The same on 2,000 images of Fashion-MNIST (n = 5 seeds, 800 steps, 2,000 of the test images,
2026-11-26; none has 83.4%): L1 1e-4 −0.3 (−0.7 to 0.2, p = 1.00), L2 5e-3 −0.2 (−0.5 to 0.2, p =
1.00), elastic 0.0 (−0.5 to 0.4, p = 1.00), decoupled decay 1 −0.1 (−0.5 to 0.3, p = 1.00),
orthogonality 1e-2 −0.1 (−0.6 to 0.3, p = 1.00), max-norm 2 −0.02 (−0.08 to 0.04, p = 1.00). Again
none moves the accuracy by half a point.
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
