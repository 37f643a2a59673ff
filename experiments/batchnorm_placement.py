"""Does batch normalization belong before or after the activation?

python -m launch.ablate --config=experiments/batchnorm_placement.py --workdir=runs/placement

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, about 2 minutes; accuracy against `after`, which has 88.0%, in points, 95% CI,
Holm-corrected p): before +1.5 (−0.3 to 3.3, p = 0.092), none +1.8 (0.1 to 3.5, p = 0.092): five
seeds decide neither.
"""

from experiments.baseline import get_config as get_config

BATCH_NORM = {'model.norm': 'batch', 'model.head_norm': 'batch'}

ARMS = {
    'after': BATCH_NORM | {'model.norm_position': 'after'},
    'before': BATCH_NORM | {'model.norm_position': 'before'},
    'none': {},
}
