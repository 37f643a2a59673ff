"""Which noise inside the network helps when there are few images?

The small net on 500 MNIST digits without noise, and with each kind at a usual rate: dropped
elements, channels or blocks after each pair, Gaussian factors of the same variance, Gaussian noise
on the images, and branches dropped at random, against a residual net that keeps all of them.

  python -m launch.ablate --config=experiments/noise.py --workdir=runs/noise

Answer (n = 5 seeds, 200 steps, 1,000 test images, 2026-11-25, two cores of an Intel Xeon server,
jaxlib 0.10.2; accuracy against none, which has 89.8%, in points, 95% CI, Holm-corrected p):
elements +0.7 (−0.5 to 1.9, p = 0.57), channels +0.5 (−0.2 to 1.1, p = 0.49), blocks +0.7 (0.2 to
1.1, p = 0.065), gaussian +0.4 (−1.1 to 1.9, p = 0.73), input noise −0.2 (−0.7 to 0.3, p = 0.73),
residual −4.6 (−5.8 to −3.4, p = 0.003), residual, stochastic depth −5.0 (−5.6 to −4.4, p < 0.001).
On the digits no noise differs significantly from none with five seeds, blocks come closest; the
residual net, which has no normalization here, is worse with and without skipping.

The same on 2,000 images of Fashion-MNIST (n = 5 seeds, 800 steps, 2,000 of the test images,
2026-11-26; none has 83.4%): elements +0.7 (0.4 to 1.0, p = 0.020), channels +0.7 (0.0 to 1.3, p =
0.18), blocks +0.2 (−0.1 to 0.4, p = 0.26), gaussian +0.4 (−0.2 to 0.9, p = 0.26), input noise −0.4
(−0.7 to 0.0, p = 0.18), residual −1.2 (−2.4 to −0.1, p = 0.18), residual, stochastic depth −1.4
(−2.0 to −0.7, p = 0.024). Here dropped elements help; of the residual nets the one that skips is
significantly worse.
"""

from experiments.baseline import get_config as get_config

RATE = {'model.dropout': 0.25}

ARMS = {
    'none': {},
    'elements': RATE,
    'channels': RATE | {'model.drop_kind': 'channel'},
    'blocks': RATE | {'model.drop_kind': 'block', 'model.drop_block': 3, 'model.drop_ramp': 0.5},
    'gaussian': RATE | {'model.drop_kind': 'gaussian'},
    'input noise': {'model.input_noise': 0.3},
    'residual': {'model.residual': True},
    'residual, stochastic depth': {'model.residual': True, 'model.stochastic_depth': 0.3},
}
