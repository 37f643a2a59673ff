"""How much dropout before the classifier is best on 500 images?

The rate is a number that the compiled step takes as an argument: all arms share one compilation.

  python -m launch.ablate --config=experiments/dropout_rate.py --workdir=runs/dropout_rate

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, about 3 minutes; accuracy against no dropout, which has 89.8%, in points, 95% CI,
Holm-corrected p): 0.25 +0.5 (−0.6 to 1.6, p = 0.54), 0.5 +0.9 (−0.2 to 1.9, p = 0.23), 0.75 −0.1
(−0.5 to 0.4, p = 0.74), 0.9 −8.2 (−10.4 to −6.0, p = 0.002). Up to 0.75 no rate differs
significantly from none with five seeds; 0.9 is too much.
"""

from experiments.baseline import get_config as get_config

ARMS = {f'dropout {rate}': {'model.head_dropout': rate} for rate in (0.0, 0.25, 0.5, 0.75, 0.9)}
