"""Does a stride of 2 lose anything against pooling?

The second convolution of each pair either strides or is followed by a 2×2 pool; the parameters,
and their initial values, are the same.

  python -m launch.ablate --config=experiments/stride_vs_pool.py --workdir=runs/stride_vs_pool

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, about 4 minutes; accuracy against `stride`, which has 89.8%, in points, 95% CI,
Holm-corrected p): max_pool +2.1 (1.4 to 2.8, p = 0.002), avg_pool +2.0 (1.2 to 2.9, p = 0.003).
Pooling is better at 500 images, for 2.4 times the multiplications.
"""

from experiments.baseline import get_config as get_config

ARMS = {name: {'model.downsample': name} for name in ('stride', 'max_pool', 'avg_pool')}
