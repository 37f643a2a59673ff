"""Published image networks up to a layer, whose output a head reads: VGG16, EfficientNet-Lite0.

A new one is a `Backbone` with its layers; `BACKBONES` names them for `config.model.name`. What its
weights are called elsewhere, and where they are published, stands in `cnn_jax.pretrained`.
"""

import itertools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.conv import Conv, max_pool
from cnn_jax.nn.norm import BatchNorm
from cnn_jax.pretrained.formats import BLOCKS, CONVOLUTIONS, TOP


class Backbone(nn.Module):
    """A network from its input to the output of layer `cut` (None: the last).

    Attributes:
        cut: One of `layers`.
        dtype: Type of the computation and the result.
        winograd: As that of `nn.conv2d`.

    The names of its modules begin with the layer's, so that `blockN` counts them from the input
    (`params.depths`).
    """

    TITLE: ClassVar[str]
    LAYERS: ClassVar[tuple[str, ...]]  # the names at which it can be cut, in order
    SIZE: ClassVar[int] = 224  # pixels a side of the images that it was published for
    MINIMUM_SIZE: ClassVar[int] = 32  # halved five times, one pixel is left

    cut: str | None = None
    dtype: Dtype = jnp.float32
    winograd: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The names at which this one can be cut, in order."""
        return self.LAYERS

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w 3'], *, train: bool = False) -> Array:
        """Features of images, preprocessed as the weights' `Preprocessing` does.

        Returns:
            `[b, h', w', filters]`; `[b, units]` from VGG16's `flatten` on.

        Errors:
            UserError: `cut` is not a layer, or the input has another shape than the network takes.
        """
        cut = self.cut or self.layers[-1]
        self.check(x.shape, cut)
        for layer in self.layers:
            x = self.layer(layer, x, train)
            if layer == cut:
                break
        return x

    def layer(self, name: str, x: Array, train: bool) -> Array:
        """The output of one of `layers`, from that of the one before."""
        raise NotImplementedError

    def check(self, shape: tuple[int, ...], cut: str) -> None:
        """Refuse a cut or images that the network does not take."""
        if cut not in self.layers:
            raise UserError(
                f'{self.TITLE} cannot be cut at {cut!r} (config.model.cut); its layers are '
                f'{", ".join(self.layers)}'
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


class VGG16(Backbone):
    """VGG16, perhaps with its top.

    Every convolution is 3×3, SAME, followed by ReLU, which belongs to the layer; every pool takes
    the maximum of 2×2 pixels and drops an odd last row or column. `fc1` and `fc2` end in ReLU,
    `predictions` are logits.

    Source: Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D; layer names of
    `keras.applications.VGG16`.
    """

    TITLE = 'VGG16'
    LAYERS = tuple(
        layer
        for block, _, count in BLOCKS
        for layer in (*(f'{block}_conv{i}' for i in range(1, count + 1)), f'{block}_pool')
    )

    include_top: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.LAYERS, 'flatten', *TOP) if self.include_top else self.LAYERS

    def layer(self, name: str, x: Array, train: bool) -> Array:
        if name in CONVOLUTIONS:
            filters = CONVOLUTIONS[name][-1]
            layer = {'activation': nn.relu, 'dtype': self.dtype, 'name': name}
            return Conv(filters, 3, winograd=self.winograd, **layer)(x)
        if name in TOP:
            x = nn.Dense(TOP[name][-1], dtype=self.dtype, name=name)(x)
            return x if name == 'predictions' else nn.relu(x)
        if name == 'flatten':
            return x.reshape(x.shape[0], -1)
        return max_pool(x, 2)

    def check(self, shape: tuple[int, ...], cut: str) -> None:
        super().check(shape, cut)
        if self.include_top and shape[1:3] != (self.SIZE, self.SIZE):
            raise UserError(
                f'VGG16 takes images of {self.SIZE}×{self.SIZE} pixels with its top, not '
                f'{shape[1]}×{shape[2]}; resize them (config.data.resize and config.data.size)'
            )


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0: 16 inverted residual blocks, then a 1×1 convolution to 1,280 channels.

    block: x → (expand to e·c channels, 1×1) → depthwise k×k/s → project, 1×1, (+ x)

    Every convolution is SAME, without a bias, and followed by batch normalization, then by
    min(max(x, 0), 6), but for the projections. The first block of each stage has its stride and no
    shortcut; the others have stride 1 and one.

    Attributes:
        momentum: Of batch normalization; may be a traced scalar.

    Modules: `stem_conv`, `stem_norm`, `block1_depthwise_conv`, `block1_depthwise_norm`,
    `block1_project_conv`, …, `block2_expand_conv`, …, `block17_conv`, `block17_norm`.

    Source: Tan and Le 2019, arXiv:1905.11946, Table 1, without squeeze-and-excitation and with
    ReLU6 (github.com/tensorflow/tpu, models/official/efficientnet/lite).
    """

    TITLE = 'EfficientNet-Lite0'
    # kernel size, expansion e, width, stride and number of blocks of each stage
    STAGES: ClassVar = (
        *((3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 2, 3)),
        *((5, 6, 112, 1, 3), (5, 6, 192, 2, 4), (3, 6, 320, 1, 1)),
    )
    LAYERS = ('stem', *(f'block{i}' for i in range(1, 18)))

    momentum: float | Float[Array, ''] = 0.99

    def layer(self, name: str, x: Array, train: bool) -> Array:
        if name == 'stem':
            return self._unit(x, name, 32, 3, stride=2, train=train)
        blocks = [
            (kernel, expansion, width, stride if first else 1, first)
            for kernel, expansion, width, stride, count in self.STAGES
            for first in (True, *itertools.repeat(False, count - 1))
        ]
        number = int(name.removeprefix('block'))
        if number > len(blocks):
            return self._unit(x, name, 1280, 1, train=train)
        kernel, expansion, width, stride, first = blocks[number - 1]
        y, wide = x, expansion * x.shape[-1]
        if expansion > 1:
            y = self._unit(y, f'{name}_expand', wide, 1, train=train)
        depthwise = {'stride': stride, 'groups': wide, 'train': train}
        y = self._unit(y, f'{name}_depthwise', wide, kernel, **depthwise)
        y = self._unit(y, f'{name}_project', width, 1, linear=True, train=train)
        return y if first else x + y

    def _unit(
        self,
        x: Array,
        name: str,
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        train: bool,
    ) -> Array:
        """Convolution, batch normalization and activation."""
        options = {'feature_group_count': groups, 'dtype': self.dtype, 'winograd': self.winograd}
        x = Conv(width, kernel, stride, use_bias=False, name=f'{name}_conv', **options)(x)
        norm = BatchNorm(self.momentum, 1e-3, name=f'{name}_norm')
        x = norm(x, train=train)
        return x if linear else nn.relu6(x)


BACKBONES: dict[str, type[Backbone]] = {'vgg16': VGG16, 'efficientnet_lite0': EfficientNetLite0}
