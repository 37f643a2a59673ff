"""From a config to a network."""

import flax.linen as nn
from jaxtyping import Array, Float

from cnn_jax.config import Model
from cnn_jax.errors import UserError
from cnn_jax.models.head import Head
from cnn_jax.models.strided_net import StridedNet
from cnn_jax.models.vgg16 import VGG16


class Classifier(nn.Module):
    """A backbone and the head that reads its output.

    Attributes:
        backbone: A module called as `backbone(x, train=...)`; its parameters are `backbone/...`.
        head: The module that turns its output into logits; `head/...`.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        return self.classify(self.features(x, train=train), train=train)

    def features(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b i j d']:
        """What the backbone makes of prepared images."""
        return self.backbone(x, train=train)

    def classify(self, features: Float[Array, 'b i j d'], *, train: bool) -> Float[Array, 'b k']:
        """The logits of images whose features are known."""
        return self.head(features, train=train)


def build(config: Model, num_classes: int) -> nn.Module:
    """The network that a config describes, called as `model(images, train=...)`.

    Args:
        config: The network's fields. Values (rates, momentum) may be traced.
        num_classes: Classes in the data, at least 2.

    Returns:
        A Linen module that maps prepared images [b, h, w, c] to float32 logits [b, outputs].

    Errors:
        UserError: `config.outputs` does not fit the number of classes.
    """
    outputs = config.outputs or num_classes
    if outputs == 1 and num_classes != 2:
        raise UserError(
            f'config.model.outputs is 1, a sigmoid for two classes, but the data have '
            f'{num_classes}; set it to 0'
        )
    if outputs not in (1, num_classes):
        raise UserError(
            f'config.model.outputs is {outputs}, but the data have {num_classes} classes; '
            'set it to 0'
        )
    if config.name == 'vgg16':
        backbone = VGG16(cut=config.cut, dtype=config.dtype)
        return Classifier(backbone, Head(config, outputs))
    return StridedNet(config, outputs)
