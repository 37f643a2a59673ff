"""Networks from a config: the strided net, a backbone, and the head that both have."""

import functools
import itertools
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.backbones import BACKBONES
from cnn_jax.config import NORMED_BACKBONES, Model
from cnn_jax.errors import UserError
from cnn_jax.nn.conv import Conv, avg_pool, global_avg_pool, max_pool
from cnn_jax.nn.noise import (
    Dropout,
    add_noise,
    channel_dropout,
    depth_rate,
    drop_block,
    dropout,
    gaussian_dropout,
    stochastic_depth,
)
from cnn_jax.nn.norm import BatchNorm, BatchRenorm, GhostBatchNorm, GroupNorm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu': nn.relu,  # max(x, 0)
    'leaky_relu': nn.leaky_relu,  # x, or 0.01·x below 0 (Maas et al. 2013)
    'elu': nn.elu,  # x, or exp(x) − 1 below 0 (Clevert et al. 2016)
    'gelu': functools.partial(nn.gelu, approximate=False),  # x·Φ(x) (Hendrycks & Gimpel 2016)
    'silu': nn.silu,  # x·sigmoid(x) (Elfwing et al. 2018)
    'tanh': nn.tanh,
}


def make_dropout(config: Model, name: str) -> Dropout:
    """Make the dropout layer that a config asks for, called as `layer(x, train=...)`."""
    kinds = {
        'element': dropout,
        'channel': channel_dropout,
        'block': functools.partial(drop_block, side=config.drop_block),
        'gaussian': gaussian_dropout,
    }
    return Dropout(config.dropout, kinds[config.drop_kind], name=name)


def make_norm(config: Model, kind: str, name: str) -> nn.Module:
    """Make a normalization layer of a kind but `none`, called as `layer(x, train=...)`."""
    epsilon = config.norm_epsilon
    groups = {'group': config.norm_groups, 'layer': 1, 'instance': None}
    if kind in groups:
        return GroupNorm(groups[kind], epsilon, name=name)
    batch = {'momentum': config.norm_momentum, 'epsilon': epsilon, 'name': name}
    if kind == 'ghost':
        return GhostBatchNorm(group_size=config.ghost_batch, **batch)
    if kind == 'renorm':
        return BatchRenorm(r_max=config.renorm_r, d_max=config.renorm_d, **batch)
    return BatchNorm(**batch)


class Scale(nn.Module):
    """Channels of mean 0 and deviation 1: (x − mean)/deviation, of statistics that stay as given.

    They start at 0 and 1; `train.setup` takes them from the features of the training images.
    """

    @nn.compact
    def __call__(self, x: Float[Array, '*b c']) -> Float[Array, '*b c']:
        def statistic(name: str, first: float) -> Array:
            init = functools.partial(jnp.full, x.shape[-1:], first, jnp.float32)
            return self.variable('batch_stats', name, init).value

        mean, deviation = statistic('mean', 0.0), statistic('deviation', 1.0)
        return (x - mean) / deviation


class Head(nn.Module):
    """Flatten or global average, perhaps `Scale`, then Dense → activation and norm → dropout for
    each hidden width, then the output Dense.

    Layers: (`scale`), `dense1`, `norm1`, `drop1`, `dense2`, …, `logits`. Hidden kernels start
    He-normal, the output's Glorot-uniform. Returns float32 logits [b, K], computed in float32.
    """

    config: Model
    num_outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        c = self.config
        x = global_avg_pool(x) if c.pool == 'average' else x
        x = Scale(name='scale')(x) if c.scale_features else x
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.hidden, start=1):
            he_normal = nn.initializers.he_normal()
            x = nn.Dense(width, dtype=c.dtype, kernel_init=he_normal, name=f'dense{i}')(x)
            x = activation_and_norm(x, c, norm=c.head_norm, name=f'norm{i}', train=train)
            x = Dropout(c.head_dropout, name=f'drop{i}')(x, train=train)
        glorot_uniform = nn.initializers.glorot_uniform()
        logits = nn.Dense(
            self.num_outputs, dtype=jnp.float32, kernel_init=glorot_uniform, name='logits'
        )
        return logits(x)


def activation_and_norm(
    x: Float[Array, '... c'], config: Model, *, norm: str, name: str, train: bool
) -> Float[Array, '... c']:
    """Apply activation and normalization (`norm`, perhaps `none`) in the configured order."""
    activation = ACTIVATIONS[config.activation]
    if norm == 'none':
        return activation(x)
    normalize = functools.partial(make_norm(config, norm, name), train=train)
    if config.norm_position == 'before':
        return activation(normalize(x))
    return normalize(activation(x))


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

    Layers: `stem_conv`, `block1_conv1`, `block1_norm1`, `block1_conv2`, `block1_norm2`,
    `block1_drop`, `block2_conv1`, …, `head`; with `residual` also `block1_shortcut_conv` and
    `block1_depth`. The call takes normalized images and returns float32 logits [b, K]; images
    that are too small for a kernel are a `UserError` that names its layer.

    Source: Springenberg et al. 2015, "Striving for Simplicity", for strides instead of pooling;
    He et al. 2016, "Deep Residual Learning", for the shortcut.
    """

    config: Model
    num_outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        c = self.config
        standardize, winograd = c.weight_standardization, c.winograd == 'always'
        conv = functools.partial(Conv, dtype=c.dtype, standardize=standardize, winograd=winograd)
        if train:
            x = add_noise(self.make_rng('dropout'), x, c.input_noise)
        if c.stem_width:
            stem = c.stem_width, c.stem_kernel, c.stem_stride, c.stem_padding
            x = conv(*stem, name='stem_conv')(x)
        for i, width in enumerate(c.widths, start=1):
            block, before = f'block{i}', x
            for j, stride in enumerate((1, c.stride if c.downsample == 'stride' else 1), start=1):
                x = conv(width, c.kernel, stride, c.padding, name=f'{block}_conv{j}')(x)
                x = activation_and_norm(x, c, norm=c.norm, name=f'{block}_norm{j}', train=train)
            if c.downsample != 'stride':
                pool = {'max_pool': max_pool, 'avg_pool': avg_pool}[c.downsample]
                x = pool(x, c.stride, padding='SAME')
            if c.residual:
                rate = depth_rate(c.stochastic_depth, i, len(c.widths))
                x = Dropout(rate, stochastic_depth, name=f'{block}_depth')(x, train=train)
                # Its filters of few weights (one, of a grey image) are not to be standardized.
                shortcut = {'name': f'{block}_shortcut_conv', 'standardize': False}
                x += conv(width, 1, c.stride, 'VALID', **shortcut)(before)
            x = make_dropout(c, f'{block}_drop')(x, train=train)
        return Head(c, self.num_outputs, name='head')(x, train=train)


class Classifier(nn.Module):
    """A backbone, called as `backbone(x, train=...)`, and the head that reads its output."""

    backbone: nn.Module
    head: nn.Module

    def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b k']:
        return self.classify(self.features(x, train=train), train=train)

    def features(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b i j d']:
        """The backbone's output for prepared images."""
        return self.backbone(x, train=train)

    def classify(
        self, features: Float[Array, 'b i j d'], *, train: bool, after: str = ''
    ) -> Float[Array, 'b k']:
        """The logits of images whose features are known, those of a layer or the backbone's."""
        if after:
            features = self.backbone(features, train=train, after=after)
        return self.head(features, train=train)

    def frozen_layers(self, trainable: Iterable[str]) -> list[str]:
        """The backbone's layers before the first with trained parameters, in order.

        The names of a layer's modules are its own or begin with it and an underscore.
        """
        trained, backbone = list(trainable), self.backbone
        layers = backbone.LAYERS[: backbone.LAYERS.index(backbone.cut or backbone.LAYERS[-1]) + 1]

        def is_frozen(layer: str) -> bool:
            own = f'backbone/{layer}/', f'backbone/{layer}_'
            return not any(name.startswith(own) for name in trained)

        return [*itertools.takewhile(is_frozen, layers)]


def build(config: Model, num_classes: int) -> nn.Module:
    """Build the network that a config describes; its values (rates, momentum) may be traced.

    Returns:
        A Linen module, called as `model(prepared images [b, h, w, c], train=...)`, that returns
        float32 logits [b, outputs].

    Errors:
        UserError: `config.outputs` does not fit the number of classes.
    """
    outputs = config.outputs or num_classes
    if outputs != num_classes and (outputs, num_classes) != (1, 2):
        sigmoid = ', a sigmoid for two classes,' if outputs == 1 else ''
        raise UserError(
            f'config.model.outputs is {outputs}{sigmoid} but the data have {num_classes} '
            'classes; set it to 0'
        )
    if config.name in BACKBONES:
        cut, winograd = config.cut or None, config.winograd == 'always'
        options = {'cut': cut, 'dtype': config.dtype, 'winograd': winograd}
        if config.name in NORMED_BACKBONES:
            options['momentum'] = config.norm_momentum
        return Classifier(BACKBONES[config.name](**options), Head(config, outputs))
    return StridedNet(config, outputs)
