"""Published image networks up to a layer, whose output a head reads.

A new one is a `Backbone` with its layers; `BACKBONES` names them for `config.model.name`. What its
weights are called elsewhere, and where they are published, stands in `cnn_jax.pretrained`.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.conv import Conv, max_pool
from cnn_jax.nn.norm import BatchNorm


class Backbone(nn.Module):
    """A network from its input to the output of layer `cut` (None: the last).

    The names of its modules begin with the layer's, so that `blockN` counts them from the input
    (`params.depths`).
    """

    TITLE: ClassVar[str]
    LAYERS: ClassVar[tuple[str, ...]]  # the names at which it can be cut, in order
    SIZE: ClassVar[int] = 224  # pixels a side of the images that it was published for
    MINIMUM_SIZE: ClassVar[int] = 32  # halved five times, one pixel is left

    cut: str | None = None  # one of `LAYERS`
    dtype: Dtype = jnp.float32  # of the computation and the result
    winograd: bool = False  # as that of `nn.conv2d`

    @nn.compact
    def __call__(
        self, x: Float[Array, 'b h w d'], *, train: bool = False, after: str = ''
    ) -> Array:
        """Features of images, preprocessed as the weights' `Preprocessing` does.

        Args:
            x: The images; or the output of the layer `after`, with which the rest is computed.
            train: Whether batch normalization takes the batch's statistics.

        Returns:
            `[b, h', w', filters]`.

        Errors:
            UserError: `cut` is not a layer, or the input has another shape than the network takes.
        """
        cut = self.cut or self.LAYERS[-1]
        if not after:
            self._check(x.shape, cut)
        start = self.LAYERS.index(after) + 1 if after else 0
        for layer in self.LAYERS[start : self.LAYERS.index(cut) + 1]:
            x = self.layer(layer, x, train)
        return x

    def layer(self, name: str, x: Array, train: bool) -> Array:
        """The output of one of `LAYERS`, from that of the one before."""
        raise NotImplementedError

    def _check(self, shape: tuple[int, ...], cut: str) -> None:
        """Refuse a cut or images that the network does not take."""
        if cut not in self.LAYERS:
            raise UserError(
                f'{self.TITLE} cannot be cut at {cut!r} (config.model.cut); its layers are '
                f'{", ".join(self.LAYERS)}'
            )
        if len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f'{self.TITLE} takes images of three channels [batch, height, width, 3], not '
                f'{list(shape)}; repeat grey images to three channels'
            )
        if min(shape[1:3]) < self.MINIMUM_SIZE:
            raise UserError(
                f'{self.TITLE} takes images of at least {self.MINIMUM_SIZE}×{self.MINIMUM_SIZE} '
                f'pixels, not {shape[1]}×{shape[2]}; resize them (config.data.resize and '
                'config.data.size)'
            )


# (block, filters, convolutions): configuration D of Simonyan and Zisserman, Table 1.
BLOCKS = (
    ('block1', 64, 2),
    ('block2', 128, 2),
    ('block3', 256, 3),
    ('block4', 512, 3),
    ('block5', 512, 3),
)


def _convolutions() -> Iterator[tuple[str, tuple[int, ...]]]:
    channels = 3
    for block, filters, count in BLOCKS:
        for i in range(1, count + 1):
            yield f'{block}_conv{i}', (3, 3, channels, filters)
            channels = filters


# Kernel shapes in the order of the layers, HWIO.
CONVOLUTIONS = dict(_convolutions())


class VGG16(Backbone):
    """VGG16 without its top.

    Every convolution is 3×3, SAME, followed by ReLU, which belongs to the layer; every pool takes
    the maximum of 2×2 pixels and drops an odd last row or column.

    Source: Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D; layer names of
    `keras.applications.VGG16`.
    """

    TITLE = 'VGG16'
    LAYERS = tuple(
        layer
        for block, _, count in BLOCKS
        for layer in (*(f'{block}_conv{i}' for i in range(1, count + 1)), f'{block}_pool')
    )

    def layer(self, name: str, x: Array, train: bool) -> Array:
        if name in CONVOLUTIONS:
            filters = CONVOLUTIONS[name][-1]
            layer = {'activation': nn.relu, 'dtype': self.dtype, 'name': name}
            return Conv(filters, 3, winograd=self.winograd, **layer)(x)
        return max_pool(x, 2)


class NormedBackbone(Backbone):
    """A backbone with batch normalization."""

    STAGES: ClassVar[tuple[tuple[int, ...], ...]]  # settings, then stride and number of blocks
    EPSILON: ClassVar[float]
    USE_BIAS: ClassVar[bool] = False  # of convolutions
    PADDING: ClassVar[str] = 'SAME'

    momentum: float | Float[Array, ''] = 0.99  # of the running averages; may be a traced scalar

    def block(self, name: str) -> tuple[tuple[int, ...], int, bool]:
        """The settings of a block's stage, its stride, and whether it is the stage's first."""
        number = int(name.removeprefix('block'))
        for *settings, stride, count in self.STAGES:
            if number <= count:
                return tuple(settings), stride if number == 1 else 1, number == 1
            number -= count
        raise AssertionError(name)

    def unit(
        self,
        x: Array,
        names: tuple[str, str],
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[[Array], Array] | None = None,
        train: bool,
    ) -> Array:
        """Convolution, batch normalization (of these names) and activation."""
        options = {'feature_group_count': groups, 'dtype': self.dtype, 'winograd': self.winograd}
        options |= {'use_bias': self.USE_BIAS, 'padding': self.PADDING}
        x = Conv(width, kernel, stride, name=names[0], **options)(x)
        x = BatchNorm(self.momentum, self.EPSILON, name=names[1])(x, train=train)
        return x if activation is None else activation(x)


class EfficientNetLite0(NormedBackbone):
    """EfficientNet-Lite0: 16 inverted residual blocks, then a 1×1 convolution to 1,280 channels.

    block: x → (expand to e·c channels, 1×1) → depthwise k×k/s → project, 1×1, (+ x)

    Every convolution is SAME, without a bias, and followed by batch normalization, then by
    min(max(x, 0), 6), but for the projections. The first block of each stage has its stride and no
    shortcut; the others have stride 1 and one.

    Modules: `stem_conv`, `stem_norm`, `block1_depthwise_conv`, `block1_depthwise_norm`,
    `block1_project_conv`, …, `block2_expand_conv`, …, `block17_conv`, `block17_norm`.

    Source: Tan and Le 2019, arXiv:1905.11946, Table 1, without squeeze-and-excitation and with
    ReLU6 (github.com/tensorflow/tpu, models/official/efficientnet/lite).
    """

    TITLE = 'EfficientNet-Lite0'
    EPSILON = 1e-3
    STAGES = (  # kernel size, expansion e, width
        *((3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 2, 3)),
        *((5, 6, 112, 1, 3), (5, 6, 192, 2, 4), (3, 6, 320, 1, 1)),
    )
    LAYERS = ('stem', *(f'block{i}' for i in range(1, 18)))

    def layer(self, name: str, x: Array, train: bool) -> Array:
        def unit(x: Array, part: str, width: int, kernel: int, **options: Any) -> Array:
            names = f'{name}{part}_conv', f'{name}{part}_norm'
            return self.unit(x, names, width, kernel, train=train, **options)

        if name == 'stem':
            return unit(x, '', 32, 3, stride=2, activation=nn.relu6)
        if name == self.LAYERS[-1]:
            return unit(x, '', 1280, 1, activation=nn.relu6)
        (kernel, expansion, width), stride, first = self.block(name)
        y, wide = x, expansion * x.shape[-1]
        if expansion > 1:
            y = unit(y, '_expand', wide, 1, activation=nn.relu6)
        depthwise = {'stride': stride, 'groups': wide, 'activation': nn.relu6}
        y = unit(y, '_depthwise', wide, kernel, **depthwise)
        y = unit(y, '_project', width, 1)
        return y if first else x + y


class ResNet50(NormedBackbone):
    """ResNet-50 as torchvision and timm have it (v1.5): 16 bottleneck blocks.

    block: ReLU(x + conv3(conv2(conv1(x)))), of 1×1, 3×3/s and 1×1 with 4 times the width

    Every convolution is followed by batch normalization, the first two of a block by ReLU, too.
    The first block of each stage has its stride, and a 1×1 convolution of it as its shortcut. As
    in PyTorch, padding is symmetric.

    Modules: `stem_conv`, `stem_norm`, `block1_conv1`, `block1_norm1`, …, `block1_norm3`,
    `block1_shortcut_conv`, `block1_shortcut_norm`, `block2_conv1`, …, `block16_norm3`.

    Source: He et al. 2016, "Deep Residual Learning", Table 1; the stride in the 3×3 convolution is
    Facebook's, github.com/facebookarchive/fb.resnet.torch.
    """

    TITLE = 'ResNet-50'
    EPSILON = 1e-5
    PADDING = 'SAME_TORCH'
    STAGES = ((64, 1, 3), (128, 2, 4), (256, 2, 6), (512, 2, 3))  # width
    LAYERS = ('stem', 'pool', *(f'block{i}' for i in range(1, 17)))
    STRIDED: ClassVar[int] = 2  # the convolution of a block that has its stride

    def layer(self, name: str, x: Array, train: bool) -> Array:
        if name == 'stem':
            options = {'stride': 2, 'activation': nn.relu, 'train': train}
            return self.unit(x, ('stem_conv', 'stem_norm'), 64, 7, **options)
        if name == 'pool':
            return max_pool(x, 3, 2, self.PADDING)
        (width,), stride, first = self.block(name)
        y = x
        for i, kernel in enumerate((1, 3, 1), start=1):
            names, wide = (f'{name}_conv{i}', f'{name}_norm{i}'), width if i < 3 else 4 * width
            options = {'stride': stride if i == self.STRIDED else 1, 'train': train}
            y = self.unit(y, names, wide, kernel, activation=nn.relu if i < 3 else None, **options)
        if first:
            names = f'{name}_shortcut_conv', f'{name}_shortcut_norm'
            x = self.unit(x, names, 4 * width, 1, stride=stride, train=train)
        return nn.relu(x + y)


class ResNet50V1(ResNet50):
    """ResNet-50 as Keras has it (v1): the stride in the first 1×1 convolution, and biases."""

    TITLE = 'ResNet-50 v1'
    EPSILON = 1.001e-5
    USE_BIAS = True
    STRIDED = 1


BACKBONES: dict[str, type[Backbone]] = {
    'vgg16': VGG16,
    'efficientnet_lite0': EfficientNetLite0,
    'resnet50': ResNet50,
    'resnet50_v1': ResNet50V1,
}
