"""Does it matter what lies beyond the image's edge?

SAME pads as TensorFlow does, SAME_TORCH as PyTorch does, both with zeros; REFLECT mirrors,
CIRCULAR wraps; VALID pads nothing, so its images and its classifier are smaller.

  python -m launch.ablate --config=experiments/padding.py --workdir=runs/padding

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-24, two cores of a Zen 4 server, jaxlib
0.10.2, about 4 minutes; accuracy against `SAME`, which has 89.8%, in points, 95% CI,
Holm-corrected p): SAME_TORCH −0.4 (−0.8 to 0.1, p = 0.21), REFLECT −0.3 (−1.3 to 0.7, p = 0.46),
CIRCULAR −0.3 (−0.6 to 0.0, p = 0.21), VALID −1.4 (−2.8 to 0.0, p = 0.21): five seeds decide none,
and digits on a black ground hardly reach the edge.
"""

from experiments.baseline import get_config as get_config

ARMS = {
    name: {'model.padding': name} for name in ('SAME', 'SAME_TORCH', 'REFLECT', 'CIRCULAR', 'VALID')
}
