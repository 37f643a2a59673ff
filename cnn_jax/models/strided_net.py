"""The strided net: convolutions that shrink the image by their stride instead of pooling."""

import functools
import itertools

import flax.linen as nn
from jaxtyping import Array, Float

from cnn_jax.config import Model
from cnn_jax.errors import UserError
from cnn_jax.models.dropping import dropping
from cnn_jax.models.head import Head, activate
from cnn_jax.nn.conv import Conv
from cnn_jax.nn.drop import Dropout
from cnn_jax.nn.gaussian import add_noise
from cnn_jax.nn.padding import Pair, Size, output_shape, pair
from cnn_jax.nn.pool import avg_pool, max_pool
from cnn_jax.nn.stochastic_depth import depth_rate, stochastic_depth


class StridedNet(nn.Module):
    """A stem, then for each width a pair of convolutions, the second of which shrinks.

    (noise) → stem Conv → [Conv → σ, norm → Conv/s → σ, norm → (pool) → dropout] for each width
    → `Head`

    With `residual` a pair is the branch of a sum, from the first convolution to the pool:

    x ← shortcut(x) + stochastic_depth(pair(x)), rate l/L of the field's for pair l of L

    The shortcut is a 1×1 convolution of the pair's stride, plain: every pair changes size and
    width, so none can be the identity of He et al.; their projection has a norm, and their sum is
    followed by an activation, where here the branch ends in one.

    The stem has neither activation nor norm, and is left out at width 0. With `downsample` at
    max_pool or avg_pool the second convolution has stride 1, and windows of s×s pixels, s apart
    and padded by SAME, shrink what the pair returns: to the very size that the stride gives, so
    that arms differing only in `downsample` share every kernel, the head's included.

    Attributes:
        config: The network's fields; its values (rates, noise, momentum, limits) may be traced.
        num_outputs: K.

    Layers: `stem_conv`, `block1_conv1`, `block1_norm1`, `block1_conv2`, `block1_norm2`,
    `block1_drop`, `block2_conv1`, …, `head`; with `residual` also `block1_shortcut_conv` and
    `block1_depth`. The call takes normalized images and returns float32 logits [b, K]; images
    below `minimum_size` are a `UserError`.

    Source: Springenberg et al. 2015, "Striving for Simplicity", for strides instead of pooling;
    He et al. 2016, "Deep Residual Learning", for the shortcut.
    """

    config: Model
    num_outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        c = self.config
        _check_size(c, x.shape[1:3])
        conv = functools.partial(Conv, dtype=c.dtype, standardize=c.weight_standardization)
        if train:
            x = add_noise(self.make_rng('dropout'), x, c.input_noise)
        if c.stem_width:
            stem = c.stem_width, c.stem_kernel, c.stem_stride, c.stem_padding
            x = conv(*stem, name='stem_conv')(x)
        for i, width in enumerate(c.widths, start=1):
            block, before = f'block{i}', x
            for j, stride in enumerate((1, c.stride if c.downsample == 'stride' else 1), start=1):
                x = conv(width, c.kernel, stride, c.padding, name=f'{block}_conv{j}')(x)
                x = activate(x, c, norm=c.norm, name=f'{block}_norm{j}', train=train)
            if c.downsample != 'stride':
                pool = {'max_pool': max_pool, 'avg_pool': avg_pool}[c.downsample]
                x = pool(x, c.stride, padding='SAME')
            if c.residual:
                rate = depth_rate(c.stochastic_depth, i, len(c.widths))
                x = Dropout(rate, stochastic_depth, name=f'{block}_depth')(x, train=train)
                # Its filters of few weights (one, of a grey image) are not to be standardized.
                shortcut = {'name': f'{block}_shortcut_conv', 'standardize': False}
                x += conv(width, 1, c.stride, 'VALID', **shortcut)(before)
            x = dropping(c, f'{block}_drop')(x, train=train)
        return Head(c, self.num_outputs, name='head')(x, train=train)


def trunk_size(config: Model, size: Size) -> Pair:
    """Height and width of what the head sees, from those of the image.

    Errors:
        UserError: a convolution's kernel does not fit its input; the message names the layer.
    """
    c, size = config, pair(size)
    if c.stem_width:
        stem = c.stem_kernel, c.stem_stride, 1, c.stem_padding
        size = output_shape(size, *stem, layer='stem_conv')
    for i in range(1, len(c.widths) + 1):
        size = output_shape(size, c.kernel, 1, 1, c.padding, layer=f'block{i}_conv1')
        # Stride 1 and a pool give the same size, see StridedNet.
        size = output_shape(size, c.kernel, c.stride, 1, c.padding, layer=f'block{i}_conv2')
    return size


def minimum_size(config: Model) -> int:
    """Side of the smallest square image that the network accepts, in pixels."""

    def fits(side):
        try:
            return trunk_size(config, (side, side))
        except UserError:
            return None

    return next(side for side in itertools.count(1) if fits(side))


def _check_size(config: Model, size: Size) -> None:
    try:
        trunk_size(config, size)
    except UserError as error:
        height, width = pair(size)
        least = minimum_size(config)
        raise UserError(
            f'{error}; the network needs images of at least {least}×{least} pixels, and these '
            f'are {height}×{width}'
        ) from error
