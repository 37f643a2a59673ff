"""Which normalization helps a small net that is trained on few images?

The small net on 500 MNIST digits without normalization, and with each kind after the activation;
the head is left without.

  python -m launch.ablate --config=experiments/normalization.py --workdir=runs/normalization

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-25, two cores of an Intel Xeon server,
jaxlib 0.10.2; accuracy against none, which has 89.8%, in points, 95% CI, Holm-corrected p): batch
−1.6 (−3.4 to 0.2, p = 0.32), ghost batch of 10 −1.6 (−3.5 to 0.2, p = 0.32), batch renormalization
−1.5 (−3.0 to −0.1, p = 0.25), group −1.0 (−2.3 to 0.3, p = 0.32), layer −0.8 (−1.8 to 0.2, p =
0.32), instance −1.7 (−3.6 to 0.3, p = 0.32), group, weights standardized −3.1 (−4.9 to −1.4, p =
0.055). None helps this net on the digits: it trains well without, and every kind is at a loss that
five seeds do not tell from none.

The same on 2,000 images of Fashion-MNIST (n = 5 seeds, 800 steps, 2,000 of the test images,
2026-11-26; none has 83.4%): batch 0.0 (−0.4 to 0.5, p = 1.00), ghost batch of 10 +0.1 (−0.4 to 0.6,
p = 1.00), batch renormalization +0.1 (−0.4 to 0.6, p = 1.00), group −0.1 (−0.6 to 0.5, p = 1.00),
layer −0.2 (−1.0 to 0.6, p = 1.00), instance +0.5 (−0.3 to 1.2, p = 1.00), group, weights
standardized 0.0 (−0.4 to 0.4, p = 1.00). Here, too, no kind differs significantly from none.
"""

from experiments.baseline import get_config as get_config

ARMS = {
    'none': {},
    'batch': {'model.norm': 'batch'},
    'ghost batch of 10': {'model.norm': 'ghost', 'model.ghost_batch': 10},
    'batch renormalization': {'model.norm': 'renorm'},
    'group': {'model.norm': 'group', 'model.norm_groups': 8},
    'layer': {'model.norm': 'layer'},
    'instance': {'model.norm': 'instance'},
    'group, weights standardized': {
        'model.norm': 'group',
        'model.norm_groups': 8,
        'model.weight_standardization': True,
    },
}
