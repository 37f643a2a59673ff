"""The names and axes that torchvision and timm give VGG16's parameters."""

import numpy as np

from cnn_jax.pretrained.layout import CONVOLUTIONS
from cnn_jax.pretrained.stored import Stored

# `features` is a sequence in which each convolution is followed by its ReLU, each block by a pool.
_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_LAYERS = {f'features.{i}': layer for i, layer in zip(_FEATURES, CONVOLUTIONS)} | {
    'classifier.0': 'fc1',  # torchvision
    'classifier.3': 'fc2',
    'classifier.6': 'predictions',
    'pre_logits.fc1': 'fc1',  # timm: the first two are convolutions
    'pre_logits.fc2': 'fc2',
    'head.fc': 'predictions',
}
_TENSORS = {'weight': 'kernel', 'bias': 'bias'}


def canonical_name(name: str) -> str:
    """`features.0.weight` → `block1_conv1/kernel`; a name that is not theirs stays as it is."""
    layer, _, tensor = name.rpartition('.')
    if layer in _LAYERS and tensor in _TENSORS:
        return f'{_LAYERS[layer]}/{_TENSORS[tensor]}'
    return name


def canonical(name: str, stored: Stored) -> Stored:
    """A tensor of theirs with its axes in canonical order.

    Convolutions are OIHW there and HWIO here. The first fully connected layer sees its input
    flattened as CHW there and HWC here, so its rows are reordered, not just transposed.

    Args:
        name: canonical.
        stored: as in the file.
    """
    if not name.endswith('/kernel'):
        return stored
    if name.startswith('block'):
        order = (2, 3, 1, 0)
        if len(stored.shape) != 4:
            return stored
        return Stored(
            tuple(stored.shape[axis] for axis in order),
            stored.dtype,
            lambda: stored.read().transpose(order),
        )
    outputs, *inputs = stored.shape
    return Stored(
        (int(np.prod(inputs)), outputs),
        stored.dtype,
        lambda: dense_kernel(stored.read(), positions=49 if name == 'fc1/kernel' else 1),
    )


def dense_kernel(weight: np.ndarray, positions: int) -> np.ndarray:
    """W[o, c·positions + p] → K[p·channels + c, o], for an input of `positions` pixels.

    Args:
        weight: `[outputs, channels · positions]`, or as a convolution `[outputs, channels, h, w]`.
        positions: h · w.

    Returns:
        `[positions · channels, outputs]`.
    """
    outputs = weight.shape[0]
    return weight.reshape(outputs, -1, positions).transpose(2, 1, 0).reshape(-1, outputs)
