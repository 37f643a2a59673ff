"""What the tensors of each backbone are called here, and in the files of other libraries."""

import collections
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from cnn_jax.backbones import BACKBONES, ResNet50
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import Network, vgg16

CLASSES = 1000
_TENSORS = {'weight': 'kernel', 'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}
_TENSORS |= {'num_batches_tracked': ''}
_LITE0_BLOCK = re.compile(r'(?:.+\.)?_blocks\.(\d{1,2})\.(_\w+)')
_LITE0_UNITS = {name: name for name in ('_expand_conv', '_depthwise_conv', '_project_conv')}
_LITE0_UNITS |= {'_bn0': '_expand_norm', '_bn1': '_depthwise_norm', '_bn2': '_project_norm'}
_LITE0_OTHERS = {'_conv_stem': 'stem_conv', '_bn0': 'stem_norm', '_fc': 'predictions'}
_LITE0_OTHERS |= {'_conv_head': 'block17_conv', '_bn1': 'block17_norm'}

_RESNET_COUNTS = [count for _, _, count in ResNet50.STAGES]
_RESNET_BLOCK = re.compile(r'(?:.+\.)?layer(\d)\.(\d)\.(conv[123]|bn[123]|downsample\.[01])')
_RESNET_OTHERS = {'conv1': 'stem_conv', 'bn1': 'stem_norm', 'fc': 'predictions'}
_KERAS_BLOCK = re.compile(r'conv(\d)_block(\d)_(\d)_(conv|bn)')
_KERAS_OTHERS = {'conv1_conv': 'stem_conv', 'conv1_bn': 'stem_norm', 'predictions': 'predictions'}
_KERAS_NUMBERED = re.compile(r'(.*?)(conv2d|batch_normalization|dense)(?:_(\d{1,9}))?/vars')
# A relative's block, with more layers in it or more blocks, must not be taken for ours.
_BLOCKS = re.compile(r'^block\d+_|(^|\.)(_blocks|layer\d+)\.\d+\.|(^|/)conv\d+_block\d+_')
_KERAS_TENSORS = {'kernel': 'kernel', 'bias': 'bias', 'gamma': 'scale', 'beta': 'bias'}
_KERAS_TENSORS |= {'moving_mean': 'mean', 'moving_variance': 'var'}


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
    return Network(backbone.TITLE, shapes, of_torch, of_keras, top, _BLOCKS)


def _of_torch(layer_of: Callable[[str], str | None], names: Sequence[str]) -> dict[str, str]:
    """The names here of torch's; '' for a count that nobody needs."""
    found = {}
    for name in names:
        layer, _, word = name.rpartition('.')
        if (ours := layer_of(layer)) and word in _TENSORS:
            tensor = 'scale' if '_norm' in ours and word == 'weight' else _TENSORS[word]
            found[name] = tensor and f'{ours}/{tensor}'
    return found


def _lite0(layer: str) -> str | None:
    """The layer here of EfficientNet-PyTorch's `_blocks.0._bn1`, under any prefix."""
    if match := _LITE0_BLOCK.fullmatch(layer):
        unit = _LITE0_UNITS.get(match[2])
        return unit and f'block{int(match[1]) + 1}{unit}'
    return _LITE0_OTHERS.get(layer.rpartition('.')[2])


def _resnet(layer: str) -> str | None:
    """The layer here of torchvision's and timm's `layer1.0.bn1`, under any prefix."""
    if match := _RESNET_BLOCK.fullmatch(layer):
        return _in_block(int(match[1]), int(match[2]), match[3])
    return _RESNET_OTHERS.get(layer.rpartition('.')[2])


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


# Of names in torch's files, and of those in Keras's.
_TRANSLATIONS = {
    'efficientnet_lite0': (functools.partial(_of_torch, _lite0), lambda shapes: {}),
    'resnet50': (functools.partial(_of_torch, _resnet), lambda shapes: {}),
    'resnet50_v1': (lambda names: {}, _resnet_of_keras),
}
