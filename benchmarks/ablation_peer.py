"""What the peers' scripts of the ablation share: options, images and the training's length."""

import argparse
from pathlib import Path

import numpy as np

EVALUATION_BATCH = 250
CLASSES = 10


def options() -> argparse.Namespace:
    """Of one run, from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument('data', type=Path, help='images and labels of both splits, .npz')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--batch', type=int, default=50)
    parser.add_argument('--learning_rate', type=float, default=1e-3)
    parser.add_argument('--dropout', type=float, default=0.0)
    parser.add_argument('--head_dropout', type=float, default=0.0)
    parser.add_argument('--norm', choices=('none', 'batch'), default='none')
    parser.add_argument('--head_norm', choices=('none', 'batch'), default='none')
    parser.add_argument('--norm_momentum', type=float, default=0.9)
    parser.add_argument('--l2', type=float, default=0.0)
    parser.add_argument(
        '--losses',
        type=Path,
        help='a file of benchmarks.problem: print the losses of its batches, from its weights',
    )
    return parser.parse_args()


def net(options: argparse.Namespace) -> dict:
    """The network as `cnn_jax.config.Model` has it: two pairs of convolutions, a hidden layer."""
    shape = {'stem_width': 0, 'widths': (32, 64), 'hidden': (128,), 'norm_epsilon': 1e-3}
    return shape | vars(options)


def images(path: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images, float32 [n, 28, 28, 1], and labels of the training and the test split.

    Standardized by the mean and the deviation of the training split.
    """
    with np.load(path) as data:
        x, test_x = (data[name].astype(np.float32) / 255 for name in ('train_x', 'test_x'))
        mean, std = x.mean(), x.std()
        return ((x - mean) / std, data['train_y']), ((test_x - mean) / std, data['test_y'])


def batches(x, y, size: int) -> list[tuple]:
    """Images and labels in order, so many at a time."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
