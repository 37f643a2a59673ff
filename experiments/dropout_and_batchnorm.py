"""Does dropout still help beside batch normalization?

A grid of both: the effect of each over the levels of the other, and their interaction (Li et al.
2018, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift").

  python -m launch.ablate --config=experiments/dropout_and_batchnorm.py --workdir=runs/grid

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, about 3 minutes; effects on the accuracy in points, 95% CI, Holm-corrected p): dropout +0.5
(−0.5 to 1.5, p = 0.50), batch norm −1.8 (−2.7 to −0.9, p = 0.017), interaction −0.1 (−2.2 to 2.1,
p = 0.94). Batch norm costs accuracy on 500 images; five seeds show no interaction, but would have
missed one of two points.
"""

from experiments.baseline import get_config as get_config

FACTORS = {
    'dropout': {'no dropout': {}, 'dropout': {'model.dropout': 0.25, 'model.head_dropout': 0.5}},
    'norm': {'no norm': {}, 'batch norm': {'model.norm': 'batch', 'model.head_norm': 'batch'}},
}
