"""What the tensors of each backbone are called here, and in the files of other libraries."""

import collections
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from cnn_jax.backbones import BACKBONES, ResNet50
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

_RESNET_COUNTS = [count for _, _, count in ResNet50.STAGES]
_RESNET_BLOCK = re.compile(r'(?:.+\.)?layer(\d)\.(\d)\.(conv[123]|bn[123]|downsample\.[01])')
_RESNET_OTHERS = {'conv1': 'stem_conv', 'bn1': 'stem_norm', 'fc': 'predictions'}
_KERAS_BLOCK = re.compile(r'conv(\d)_block(\d)_(\d)_(conv|bn)')
_KERAS_OTHERS = {'conv1_conv': 'stem_conv', 'conv1_bn': 'stem_norm', 'predictions': 'predictions'}
_KERAS_NUMBERED = re.compile(r'(.*?)(conv2d|batch_normalization|dense)(?:_(\d{1,9}))?/vars')
_KERAS_TENSORS = {
    'kernel': 'kernel',
    'bias': 'bias',
    'gamma': 'scale',
    'beta': 'bias',
    'moving_mean': 'mean',
    'moving_variance': 'var',
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
    of_torch, of_keras = _TRANSLATIONS[name]
    return Network(backbone.TITLE, shapes, of_torch, of_keras, top)


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
    if '_norm' in layer and tensor == 'weight':
        return f'{layer}/scale'
    return _TENSORS[tensor] and f'{layer}/{_TENSORS[tensor]}'


def _resnet(names: Sequence[str]) -> dict[str, str]:
    """The names here of torchvision's and timm's `layer1.0.bn1.weight`, under any prefix."""
    found = {}
    for name in names:
        layer, _, tensor = name.rpartition('.')
        ours = _RESNET_OTHERS.get(layer.rpartition('.')[2])
        if match := _RESNET_BLOCK.fullmatch(layer):
            ours = _in_block(int(match[1]), int(match[2]), match[3])
        if ours and tensor in _TENSORS:
            found[name] = _joined(ours, tensor)
    return found


def _in_block(stage: int, index: int, part: str) -> str | None:
    """The layer of a part, in torch's words, of a stage's block, counted from 1 and from 0."""
    if not 1 <= stage <= len(_RESNET_COUNTS) or index >= _RESNET_COUNTS[stage - 1]:
        return None
    part = {'downsample.0': 'shortcut_conv', 'downsample.1': 'shortcut_norm'}.get(part, part)
    number = sum(_RESNET_COUNTS[: stage - 1]) + index + 1
    return f'block{number}_{part.replace("bn", "norm")}'


def _resnet_of_keras(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The names here of tensors in Keras's files, whose layers are named or numbered."""
    found, series = {}, collections.defaultdict(dict)
    for name in shapes:
        *groups, tensor = name.split('/')
        layer = next(filter(None, map(_keras_layer, reversed(groups))), None)
        if layer and (ours := _KERAS_TENSORS.get(tensor.partition(':')[0])):
            found[name] = f'{layer}/{ours}'
        elif match := _KERAS_NUMBERED.fullmatch('/'.join(groups)):
            series[match[1], match[2]][int(match[3] or 0)] = '/'.join(groups)
    for (_, kind), numbered in series.items():
        order, tensors = _KERAS_SERIES[kind]
        if len(order) == len(numbered):  # layers of a kind count on from first to last
            for layer, number in zip(order, sorted(numbered)):
                for i, tensor in enumerate(tensors):
                    found[f'{numbered[number]}/{i}'] = f'{layer}/{tensor}'
    return found


def _keras_layer(group: str) -> str | None:
    """The layer here of Keras's `conv2_block1_0_bn`."""
    match = _KERAS_BLOCK.fullmatch(group)
    if not match or match[3] not in '0123':
        return _KERAS_OTHERS.get(group)
    part = match[4] + match[3]
    part = {'conv0': 'downsample.0', 'bn0': 'downsample.1'}.get(part, part)
    return _in_block(int(match[1]) - 1, int(match[2]) - 1, part)


def _keras_order(kind: str) -> list[str]:
    """The layers of a kind, conv or norm, in the order in which Keras numbers them."""
    order = [f'stem_{kind}']
    firsts = [sum(_RESNET_COUNTS[:i]) + 1 for i in range(len(_RESNET_COUNTS))]
    for number in range(1, sum(_RESNET_COUNTS) + 1):
        shortcut = [f'shortcut_{kind}'] if number in firsts else []
        parts = f'{kind}1', f'{kind}2', *shortcut, f'{kind}3'
        order += [f'block{number}_{part}' for part in parts]
    return order


_KERAS_SERIES = {
    'conv2d': (_keras_order('conv'), ('kernel', 'bias')),
    'batch_normalization': (_keras_order('norm'), ('scale', 'bias', 'mean', 'var')),
    'dense': (['predictions'], ('kernel', 'bias')),
}


def _nothing(names: Iterable[str]) -> dict[str, str]:
    return {}


# Of names in torch's files, and of those in Keras's.
_TRANSLATIONS = {
    'efficientnet_lite0': (_lite0, _nothing),
    'resnet50': (_resnet, _nothing),
    'resnet50_v1': (_nothing, _resnet_of_keras),
}
