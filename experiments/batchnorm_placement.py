"""Does batch normalization belong before or after the activation?

python -m launch.ablate --config=experiments/batchnorm_placement.py --workdir=runs/placement

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, 6 minutes beside other work; accuracy against `after`, points, 95% CI, Holm-corrected p):
before +2.2 (1.3 to 3.2, p = 0.005), none +2.6 (1.1 to 4.2, p = 0.009).
"""

from experiments.baseline import get_config as get_config

BATCH_NORM = {'model.norm': 'batch', 'model.head_norm': 'batch'}

ARMS = {
    'after': BATCH_NORM | {'model.norm_position': 'after'},
    'before': BATCH_NORM | {'model.norm_position': 'before'},
    'none': {},
}
