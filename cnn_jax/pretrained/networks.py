"""The names of each backbone's tensors here, and in the files of other libraries."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from cnn_jax.backbones import BACKBONES, CONVOLUTIONS, ResNet50
from cnn_jax.params import flatten

CLASSES = 1000

# Layers with these names belong to a VGG backbone; one that VGG16 lacks is another network's.
VGG_LAYER = re.compile(r'(block\d+_conv\d+|features\.\d+)\b')
_VGG_KERAS = {4: 'kernel', 2: 'kernel', 1: 'bias'}  # tensors by rank

# In torchvision's `features` a ReLU follows each convolution, and a pool each block.
_TORCH_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_TORCH_LAYERS = {f'features.{i}': layer for i, layer in zip(_TORCH_FEATURES, CONVOLUTIONS)}
_TORCH_TENSORS = {'weight': 'kernel', 'bias': 'bias'}
_TORCH_NUMBERED = re.compile(r'((?:.*\.)?)(\d+\.\w+)')  # prefix, and number with tensor

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


@dataclass(frozen=True)
class Network:
    """A network's tensors, and their names elsewhere."""

    title: str
    shapes: Mapping[str, tuple[int, ...]]  # as those of `shapes`
    # From the names in a torch file to those in `shapes`, of the tensors that it knows.
    of_torch: Callable[[Sequence[str]], Mapping[str, str]]
    # The same of the names, with shapes, in a Keras file.
    of_keras: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, str]] = lambda shapes: {}
    optional: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # read where they fit
    block: re.Pattern[str] = re.compile('(?!)')  # in others' names of its blocks' tensors


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


# VGG16.


def vgg16() -> Network:
    """VGG16's convolutions."""
    return Network('VGG16', shapes(), _vgg16_of_torch, _vgg16_of_keras)


def shapes() -> dict[str, tuple[int, ...]]:
    """Return all shapes in canonical order: `{'block1_conv1/kernel': (3, 3, 3, 64), …}`."""
    return {
        f'{layer}/{tensor}': kernel if tensor == 'kernel' else kernel[-1:]
        for layer, kernel in CONVOLUTIONS.items()
        for tensor in ('kernel', 'bias')
    }


def _vgg16_of_keras(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The names of VGG16's tensors in a Keras file."""
    numbered, names = _numbered_layers(shapes), {}
    for name, shape in shapes.items():
        *groups, _ = name.split('/')
        named = [g for g in groups if g in CONVOLUTIONS or VGG_LAYER.fullmatch(g)]
        if layer := named[-1] if named else numbered.get('/'.join(groups)):
            names[name] = f'{layer}/{_VGG_KERAS.get(len(shape), name)}'
    return names


def _numbered_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The layers of groups such as `block1/layers/conv2d_1/vars`, by the order of their numbers.

    They are those below any one group whose names differ in numbers alone and whose kernels have
    VGG16's shapes in this order, whatever else the model holds.
    """
    series: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        if name.endswith('/vars/0') and len(shape) == 4:
            groups = name.split('/')[:-1]
            for depth in range(len(groups)):
                above, below = '/'.join(groups[:depth]), '/'.join(groups[depth:])
                series[above, re.sub(r'_?\d+', '', below)].append('/'.join(groups))

    def numbers(path: str) -> list[list[int]]:
        return [[int(n) for n in re.findall(r'\d{1,9}', part)] for part in path.split('/')]

    layers = {}
    for convolutions in series.values():
        convolutions.sort(key=numbers)
        if [shapes[f'{each}/0'] for each in convolutions] == list(CONVOLUTIONS.values()):
            layers |= zip(convolutions, CONVOLUTIONS)
    return layers


def _vgg16_of_torch(names: Sequence[str]) -> dict[str, str]:
    """The names here of VGG16's `features.0.weight`, and of its `vgg.0.weight` under any prefix.

    A prefix is one that ends in `features`, or under which all 13 convolutions have their numbers.
    """
    below: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if match := _TORCH_NUMBERED.fullmatch(name):
            below[match[1]][name] = f'features.{match[2]}'
    whole = {f'{layer}.weight' for layer in _TORCH_LAYERS}
    found = {}
    for prefix, inside in below.items():
        if prefix.endswith('features.') or whole <= {*inside.values()}:
            found |= {name: canonical_name(known) for name, known in inside.items()}
    return found


def canonical_name(name: str) -> str:
    """Translate `features.0.weight` to `block1_conv1/kernel`, under any prefix; no other name."""
    layer, _, tensor = name.rpartition('.')
    layer = layer[max(0, layer.rfind('.features.') + 1) :]
    if layer in _TORCH_LAYERS and tensor in _TORCH_TENSORS:
        return f'{_TORCH_LAYERS[layer]}/{_TORCH_TENSORS[tensor]}'
    return name


# Backbones with batch normalization.


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
    found, series = {}, defaultdict(dict)
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
