"""Noise in training: the dropout family, normal noise, stochastic depth, and their random bits."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, UInt32

from cnn_jax.nn.cpu import compute_type, materialize, on_cpu, platform

Rate = float | Float[Array, '']
Noise = Callable[[Key[Array, ''], Float[Array, '...'], Rate], Array]

_LEVELS = 2**16
_SEED_LEVELS = 2**24  # a seed of `drop_block` is rare, so its probability needs more digits
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def random_bits(key: Key[Array, ''], shape: tuple[int, ...]) -> UInt32[Array, '...']:
    """Return 32 random bits for each element; with a Threefry key by arithmetic that XLA fuses.

    They are the first word of Threefry-2x32(key, (0, position)). Without the loops of
    `jax.random.bits` a network with dropout compiles in about half the time. Keys of other kinds
    (`rbg`, `unsafe_rbg`) give what `jax.random.bits` gives.

    Args:
        key: A random key of any kind, typed or raw.
        shape: Shape of the result, at most 2³² elements.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; 20 rounds.

    >>> nn.random_bits(jax.random.key(0), (2, 3)).dtype
    dtype('uint32')
    """
    if str(jax.random.key_impl(key)) != 'threefry2x32':
        return materialize(jax.random.bits(key, shape, jnp.uint32))
    words = jax.random.key_data(key)
    if platform() == 'gpu':  # which else computes each word by a kernel of its own
        words = lax.optimization_barrier(words)  # a division over TPU chips has no barriers
    k0, k1 = words
    position = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return materialize(_threefry(k0, k1, jnp.zeros_like(position), position)[0])


def _threefry(k0, k1, x0, x1):
    keys = k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << r) | (x1 >> (32 - r)))
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def dropout(
    key: Key[Array, ''], x: Float[Array, '... c'], rate: Rate, shape: tuple[int, ...] | None = None
) -> Float[Array, '... c']:
    """Set each element to zero with probability r and divide the others by 1 − r.

    y = x · m / (1 − r), m ~ Bernoulli(1 − r); so E[y] = x and Var[y] = x² · r / (1 − r).

    r is rounded to a multiple of 2⁻¹⁶, and the rounded r also divides, so the mean stays exact.
    Rates 0 (y is x, bit for bit; XLA may flush subnormals) and 1 (y is zero) are exact, with their
    gradients.

    Args:
        key: A random key; the same key gives the same mask.
        x: The input.
        rate: r, 0 to 1; traced or not, the computation is the same.
        shape: Shape of the mask, if elements share theirs; broadcasts to the shape of x.

    Source: Srivastava et al. 2014, "Dropout"; the division is the "inverted" form in use today.

    >>> nn.dropout(jax.random.key(0), jnp.ones((2, 3)), 0.0).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    kept = jnp.round((1 - jnp.asarray(rate, jnp.float32)) * _LEVELS).astype(jnp.uint32)
    is_kept = random_bits(key, x.shape if shape is None else shape) >> 16 < kept
    return _kept(x, is_kept, _LEVELS / jnp.maximum(kept, 1).astype(compute_type(x)))


def _kept(x, is_kept, scale):
    return jnp.where(is_kept, x.astype(scale.dtype) * scale, 0).astype(x.dtype)


def is_training(train: bool | None, inference: bool | None, name: str) -> bool:
    """The mode of a call that says either `train` or, as Flax does, the opposite (`name`)."""
    if (train is None) == (inference is None):
        raise TypeError(f'call the layer with either train=… or {name}=…')
    return bool(train) if inference is None else not inference


class Dropout(nn.Module):
    """Noise in training, the identity at inference.

    Attributes:
        rate: Strength of the noise: for `dropout` the probability that an element is dropped, 0 to
            1; a float or a traced scalar, so that one compiled step serves every rate.
        noise: A function called as `noise(key, x, rate)`, such as `channel_dropout`.

    Call it with `train`, or with Flax's `deterministic`, its opposite. It draws from the random
    stream 'dropout', whatever the rate, so no rate shifts another layer's mask.

    >>> layer = nn.Dropout(0.5)
    >>> y = layer.apply({}, jnp.ones((4, 4)), train=True, rngs={'dropout': jax.random.key(0)})
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 2.0]
    """

    rate: Rate
    noise: Noise = dropout

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '... c'],
        *,
        train: bool | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, '... c']:
        training = is_training(train, deterministic, 'deterministic')
        return self.noise(self.make_rng('dropout'), x, self.rate) if training else x


def channel_dropout(
    key: Key[Array, ''], x: Float[Array, 'b ... c'], rate: Rate
) -> Float[Array, 'b ... c']:
    """Set each channel of each example to zero with probability r, divide the others by 1 − r.

    y[b,…,c] = x[b,…,c] · m[b,c] / (1 − r), m ~ Bernoulli(1 − r)

    Arguments and exactness as in `dropout`.

    Source: Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks",
    where it is called spatial dropout.

    >>> y = nn.channel_dropout(jax.random.key(0), jnp.ones((2, 5, 5, 3)), 0.5)
    >>> bool((y == y[:, :1, :1]).all())
    True
    """
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return dropout(key, x, rate, shape)


def stochastic_depth(
    key: Key[Array, ''], x: Float[Array, 'b ...'], rate: Rate
) -> Float[Array, 'b ...']:
    """Set the branch x of each example to zero with probability r, divide the others by 1 − r.

    y[b] = x[b] · m[b] / (1 − r), m ~ Bernoulli(1 − r); the layer's output is shortcut + y.

    Huang et al. multiply by 1 − r at inference instead of dividing. Arguments and exactness as in
    `dropout`.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".

    >>> y = nn.stochastic_depth(jax.random.key(0), jnp.ones((8, 5, 5, 3)), 0.5)
    >>> bool((y == y[:, :1, :1, :1]).all())
    True
    """
    return dropout(key, x, rate, (x.shape[0], *(1,) * (x.ndim - 1)))


def depth_rate(rate: Rate, number: int, count: int) -> Rate:
    """The rate of stochastic depth for branch `number` of `count`, from 1: r_l = r · l / L.

    Source: Huang et al. 2016, equation 4, with r = 1 − p_L.

    >>> [nn.depth_rate(0.5, number, 2) for number in (1, 2)]
    [0.25, 0.5]
    """
    return rate * (number / count)


def drop_block(
    key: Key[Array, ''], x: Float[Array, 'b h w c'], rate: Rate, side: int = 7
) -> Float[Array, 'b h w c']:
    """Set k×k squares of each channel to zero and scale the rest to make up for it.

    y = x · m · count(m) / Σm,   γ = r/k² · h·w / ((h − k + 1)·(w − k + 1))

    Each position at which a square fits becomes the corner of a dropped one with probability γ; m
    is 0 in their union, and its count runs over the whole batch. Squares overlap, so the share
    dropped stays below r: pixel (i,j), on which n positions bear, is kept with probability
    (1 − γ)ⁿ. Rate 0 is the identity, bit for bit; if all is dropped, y is 0.

    Args:
        key, x, rate: As in `dropout`; γ is at most 1.
        side: k, in pixels; clipped to the height and the width.

    Source: Ghiasi et al. 2018, "DropBlock", algorithm 1, with a mask for each channel. There a
    seed is the centre of its square, which for odd k is the same distribution.

    >>> y = nn.drop_block(jax.random.key(0), jnp.ones((2, 9, 9, 3)), 0.2, side=3)
    >>> bool((y == 0).any())
    True
    """
    height, width = x.shape[1:3]
    sides = min(side, height), min(side, width)
    places = height - sides[0] + 1, width - sides[1] + 1
    gamma = jnp.asarray(rate, jnp.float32) * (height * width)
    gamma = jnp.minimum(gamma / (sides[0] * sides[1] * places[0] * places[1]), 1)
    threshold = jnp.round(gamma * _SEED_LEVELS).astype(jnp.uint32)
    corners = random_bits(key, (x.shape[0], *places, x.shape[3])) >> 8 < threshold
    dropped = _spread(materialize(_spread(materialize(corners), 1, sides[0])), 2, sides[1])

    is_kept = ~materialize(dropped)
    count = jnp.maximum(jnp.sum(is_kept, dtype=jnp.uint32), 1)
    return _kept(x, is_kept, float(x.size) / count.astype(compute_type(x)))


def _spread(mask: Bool[Array, 'b h w c'], axis: int, side: int) -> Bool[Array, 'b h2 w2 c']:
    """Let each True become a run of `side` from there on; the axis grows by side − 1."""

    def shift(before, after):
        widths = [(before, after, 0) if a == axis else (0, 0, 0) for a in range(mask.ndim)]
        return lax.pad(mask, False, widths)

    mask, run = shift(0, side - 1), 1
    while run < side:  # runs of any length from few shifts: 1, 2, 4, … and what is left
        step = min(run, side - run)
        mask, run = mask | shift(step, -step), run + step
    return mask


def normal(key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
    """Draw standard normal numbers by inversion, z = √2 · erf⁻¹(u), float32.

    u takes 2²³ equidistant values that lie symmetrically in (−1, 1), so |z| is below 5.3.
    """
    steps = (random_bits(key, shape) >> 9).astype(jnp.float32)
    return jnp.sqrt(2.0).astype(jnp.float32) * lax.erf_inv((steps + 0.5) * 2.0**-22 - 1)


def gaussian_dropout(
    key: Key[Array, ''], x: Float[Array, '... c'], rate: Rate
) -> Float[Array, '... c']:
    """Multiply each element by a normal number whose variance is that of dropout.

    y = x · (1 + √(r/(1 − r)) · z), z ~ N(0, 1); so E[y] = x and Var[y] = x² · r / (1 − r).

    Arguments as in `dropout`, but r is below 1. 0 is the identity, bit for bit.

    Source: Srivastava et al. 2014, "Dropout", section 10; the variance as in Keras's
    `GaussianDropout`.

    >>> nn.gaussian_dropout(jax.random.key(0), jnp.ones((2, 3)), 0.5).shape
    (2, 3)
    """
    rate = jnp.asarray(rate, jnp.float32)
    factor = 1 + jnp.sqrt(rate / (1 - rate)) * normal(key, x.shape)
    compute = compute_type(x)
    return (x.astype(compute) * factor.astype(compute)).astype(x.dtype)


def add_noise(
    key: Key[Array, ''], x: Float[Array, '...'], deviation: float | Float[Array, '']
) -> Float[Array, '...']:
    """Add a normal number to each element.

    y = x + σ·z, z ~ N(0, 1)

    Args:
        key, x: As in `dropout`.
        deviation: σ, at least 0, in units of x; traced or not. At 0, y is x; a CPU then draws
            nothing, where a GPU would wait for its host at a branch longer than it takes to draw.

    Source: Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization".

    >>> nn.add_noise(jax.random.key(0), jnp.zeros((2, 3)), 0.1).shape
    (2, 3)
    """

    def noisy(x):
        compute = compute_type(x)
        noise = deviation * normal(key, x.shape)
        return (x.astype(compute) + noise.astype(compute)).astype(x.dtype)

    is_noisy = jnp.asarray(deviation) > 0
    if on_cpu():
        return lax.cond(is_noisy, noisy, lambda x: x, x)
    return jnp.where(is_noisy, noisy(x), x)
