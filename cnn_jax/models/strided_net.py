"""The strided net: convolutions that shrink the image by their stride instead of pooling."""

import itertools

import flax.linen as nn
from jaxtyping import Array, Float

from cnn_jax.config import Model
from cnn_jax.errors import UserError
from cnn_jax.models.head import Head, activate
from cnn_jax.nn.conv import Conv
from cnn_jax.nn.drop import Dropout
from cnn_jax.nn.padding import Pair, Size, output_shape, pair
from cnn_jax.nn.pool import avg_pool, max_pool


class StridedNet(nn.Module):
    """A stem, then for each width a pair of convolutions, the second of which shrinks.

    stem Conv → [Conv → σ, norm → Conv/s → σ, norm → (pool) → dropout] for each width → `Head`

    The stem has neither activation nor norm, and is left out at width 0. With `downsample` at
    max_pool or avg_pool the second convolution has stride 1, and windows of s×s pixels, s apart
    and padded by SAME, shrink what the pair returns: to the very size that the stride gives, so
    that arms differing only in `downsample` share every kernel, the head's included.

    Attributes:
        config: The network's fields; dropout rates and norm momentum may be traced.
        num_outputs: K.

    Layers: `stem_conv`, `block1_conv1`, `block1_norm1`, `block1_conv2`, `block1_norm2`,
    `block1_drop`, `block2_conv1`, …, `head`. The call takes normalized images and returns
    float32 logits [b, K]; images below `minimum_size` are a `UserError`.

    Source: Springenberg et al. 2015, "Striving for Simplicity", for strides instead of pooling.
    """

    config: Model
    num_outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        c = self.config
        _check_size(c, x.shape[1:3])
        if c.stem_width:
            x = Conv(
                c.stem_width,
                c.stem_kernel,
                c.stem_stride,
                c.stem_padding,
                dtype=c.dtype,
                name='stem_conv',
            )(x)
        for i, width in enumerate(c.widths, start=1):
            for j, stride in enumerate((1, c.stride if c.downsample == 'stride' else 1), start=1):
                name = f'block{i}_conv{j}'
                x = Conv(width, c.kernel, stride, c.padding, dtype=c.dtype, name=name)(x)
                x = activate(x, c, norm=c.norm, name=f'block{i}_norm{j}', train=train)
            if c.downsample != 'stride':
                pool = {'max_pool': max_pool, 'avg_pool': avg_pool}[c.downsample]
                x = pool(x, c.stride, padding='SAME')
            x = Dropout(c.dropout, name=f'block{i}_drop')(x, train=train)
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
