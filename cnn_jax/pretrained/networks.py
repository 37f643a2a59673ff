"""What the tensors of each backbone are called here, and in the files of other libraries."""

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cnn_jax.backbones import BACKBONES
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import Network, vgg16

CLASSES = 1000
_TENSORS = {
    'weight': 'kernel',
    'bias': 'bias',
    'running_mean': 'mean',
    'running_var': 'var',
    'num_batches_tracked': '',
}
_LITE0_BLOCK = re.compile(r'(?:.+\.)?_blocks\.(\d{1,2})\.(_\w+)')
_LITE0_UNITS = {'_expand_conv': '_bn0', '_depthwise_conv': '_bn1', '_project_conv': '_bn2'}
_LITE0_OTHERS = {
    '_conv_stem': 'stem_conv',
    '_bn0': 'stem_norm',
    '_conv_head': 'block17_conv',
    '_bn1': 'block17_norm',
    '_fc': 'predictions',
}


def network(name: str) -> Network:
    """The tensors of a backbone, one of `BACKBONES`; with batch norm its statistics, too."""
    return vgg16() if name == 'vgg16' else _normed(name)


@functools.cache
def _normed(name: str) -> Network:
    backbone = BACKBONES[name]
    image = jax.ShapeDtypeStruct((1, backbone.SIZE, backbone.SIZE, 3), jnp.float32)
    features, variables = jax.eval_shape(backbone().init_with_output, jax.random.key(0), image)
    shapes = {
        path: leaf.shape
        for collection in ('params', 'batch_stats')
        for path, leaf in flatten(variables[collection]).items()
    }
    top = {'predictions/kernel': (features.shape[-1], CLASSES), 'predictions/bias': (CLASSES,)}
    return Network(backbone.TITLE, shapes, _OF_TORCH[name], top)


def _lite0(names: Sequence[str]) -> dict[str, str]:
    """The names here of EfficientNet-PyTorch's `_blocks.0._bn1.weight`, under any prefix."""
    found = {}
    for name in names:
        layer, _, tensor = name.rpartition('.')
        ours = _LITE0_OTHERS.get(layer.rpartition('.')[2])
        if match := _LITE0_BLOCK.fullmatch(layer):
            ours = None
            for conv, norm in _LITE0_UNITS.items():
                if match[2] in (conv, norm):
                    unit = conv if match[2] == conv else conv.replace('_conv', '_norm')
                    ours = f'block{int(match[1]) + 1}{unit}'
        if ours and tensor in _TENSORS:
            found[name] = _joined(ours, tensor)
    return found


def _joined(layer: str, tensor: str) -> str:
    """`layer/tensor` for torch's word for the tensor; '' for a count that nobody needs."""
    if layer.endswith('_norm') and tensor == 'weight':
        return f'{layer}/scale'
    return _TENSORS[tensor] and f'{layer}/{_TENSORS[tensor]}'


_OF_TORCH = {'efficientnet_lite0': _lite0}
