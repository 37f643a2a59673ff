"""VGG16: thirteen 3×3 convolutions in five blocks, and three fully connected layers."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from cnn_jax.errors import UserError
from cnn_jax.nn.conv import Conv
from cnn_jax.nn.pool import max_pool
from cnn_jax.pretrained.layout import BLOCKS, CONVOLUTIONS, TOP

MINIMUM_SIZE = 32  # five poolings leave one pixel

_BACKBONE = tuple(
    layer
    for block, _, count in BLOCKS
    for layer in (*(f'{block}_conv{i}' for i in range(1, count + 1)), f'{block}_pool')
)


def layers(include_top: bool = False) -> tuple[str, ...]:
    """The names at which the network can be cut, in order."""
    return (*_BACKBONE, 'flatten', *TOP) if include_top else _BACKBONE


class VGG16(nn.Module):
    """VGG16 from its input to the output of layer `cut`.

    Every convolution is 3×3, SAME, followed by ReLU, which belongs to the layer; every pool takes
    the maximum of 2×2 pixels and drops an odd last row or column. `fc1` and `fc2` end in ReLU,
    `predictions` are logits.

    Attributes:
        cut: The last layer computed, one of `layers`; None is the last there is.
        include_top: Whether the fully connected layers are there; the input is 224×224 then.
        dtype: Of the computation; parameters are float32.

    Source: Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D; layer names of
    `keras.applications.VGG16`.
    """

    cut: str | None = None
    include_top: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w 3'], *, train: bool = False) -> Array:
        """Features of preprocessed images.

        Args:
            x: Images, preprocessed as the weights' `Preprocessing` does; 32 pixels or more a side.
            train: Changes nothing: there is no dropout and no batch normalization here.

        Returns:
            `[b, h', w', filters]` for a convolution or a pool, `[b, units]` from `flatten` on.

        Errors:
            UserError: `cut` is not a layer, or the input has another shape than the network takes.
        """
        del train
        cut = self.cut or layers(self.include_top)[-1]
        _check(x.shape, cut, self.include_top)
        for layer in layers(self.include_top):
            x = self._layer(layer, x)
            if layer == cut:
                break
        return x

    def _layer(self, name: str, x: Array) -> Array:
        if name in CONVOLUTIONS:
            filters = CONVOLUTIONS[name][-1]
            return nn.relu(Conv(filters, 3, dtype=self.dtype, name=name)(x))
        if name in TOP:
            x = nn.Dense(TOP[name][-1], dtype=self.dtype, name=name)(x)
            return x if name == 'predictions' else nn.relu(x)
        if name == 'flatten':
            return x.reshape(x.shape[0], -1)
        return max_pool(x, 2)


def _check(shape: tuple[int, ...], cut: str, include_top: bool) -> None:
    if cut not in layers(include_top):
        raise UserError(
            f'VGG16 {"with" if include_top else "without"} its top cannot be cut at {cut!r}; its '
            f'layers are {", ".join(layers(include_top))}'
        )
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(
            f'VGG16 takes images of three channels [batch, height, width, 3], not {list(shape)}; '
            'repeat grey images to three channels'
        )
    if min(shape[1:3]) < MINIMUM_SIZE:
        raise UserError(
            f'VGG16 takes images of at least {MINIMUM_SIZE}×{MINIMUM_SIZE} pixels, not '
            f'{shape[1]}×{shape[2]}; resize them (config.data.resize and config.data.size)'
        )
    if include_top and shape[1:3] != (224, 224):
        raise UserError(
            f'VGG16 with its top takes 224×224 pixels, not {shape[1]}×{shape[2]}; resize the '
            'images or leave the top out'
        )
