"""Noise in training: the dropout family, normal noise, stochastic depth, and their random bits."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, UInt32

from cnn_jax.nn.cpu import materialize

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def random_bits(key: Key[Array, ''], shape: tuple[int, ...]) -> UInt32[Array, '...']:
    """32 random bits for each element: the first word of Threefry-2x32(key, (0, position)).

    `jax.random.bits` draws its bits in compiled loops; here they are plain arithmetic, and a
    network with dropout compiles in about half the time. A CPU draws them once and stores them, an
    accelerator where they are used.

    Args:
        key: A threefry key.
        shape: At most 2³² elements.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; 20 rounds.
    """
    k0, k1 = jax.random.key_data(key)
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


_LEVELS = 2**16

Noise = Callable[[Key[Array, ''], Float[Array, '...'], float | Float[Array, '']], Array]


def dropout(
    key: Key[Array, ''],
    x: Float[Array, '... c'],
    rate: float | Float[Array, ''],
    shape: tuple[int, ...] | None = None,
) -> Float[Array, '... c']:
    """Sets each element to zero with probability r and divides the others by 1 − r.

    y = x · m / (1 − r), m ~ Bernoulli(1 − r); so E[y] = x and Var[y] = x² · r / (1 − r).

    The mask compares 16 random bits with a threshold: r is rounded to a multiple of 2⁻¹⁶, and the
    rounded r also divides, so the mean stays exact. Rates 0 (y is x, bit for bit;
    XLA may flush subnormals) and 1 (y is zero) are exact, with their gradients.

    Args:
        key: Random key; the same key gives the same mask.
        x: input.
        rate: r, 0 to 1; traced or not, the computation is the same.
        shape: Of the mask, if elements share theirs; broadcasts to the shape of x.

    Source: Srivastava et al. 2014, "Dropout"; the division is the "inverted" form in use today.
    """
    kept = jnp.round((1 - jnp.asarray(rate, jnp.float32)) * _LEVELS).astype(jnp.uint32)

    compute = jnp.promote_types(x.dtype, jnp.float32)
    scale = _LEVELS / jnp.maximum(kept, 1).astype(compute)
    is_kept = random_bits(key, shape or x.shape) >> 16 < kept
    return jnp.where(is_kept, x.astype(compute) * scale, 0).astype(x.dtype)


class Dropout(nn.Module):
    """A noise in training, the identity at inference.

    Attributes:
        rate: How much of it: for `dropout` the probability that an element is dropped, 0 to 1; a
            float or a traced scalar, so that one compiled step serves every rate.
        noise: Called as `noise(key, x, rate)`.

    Draws from the random stream 'dropout', whatever the rate, so no rate shifts another
    layer's mask.
    """

    rate: float | Float[Array, '']
    noise: Noise = dropout

    @nn.compact
    def __call__(self, x: Float[Array, '... c'], *, train: bool) -> Float[Array, '... c']:
        return self.noise(self.make_rng('dropout'), x, self.rate) if train else x


def channel_dropout(
    key: Key[Array, ''], x: Float[Array, 'b ... c'], rate: float | Float[Array, '']
) -> Float[Array, 'b ... c']:
    """Sets each channel of each example to zero with probability r, divides the others by 1 − r.

    y[b,…,c] = x[b,…,c] · m[b,c] / (1 − r), m ~ Bernoulli(1 − r)

    Neighbouring pixels are alike, so that dropping them one by one removes little; a channel goes
    as a whole. Arguments and exactness as in `dropout`.

    Source: Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks",
    where it is called spatial dropout.
    """
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return dropout(key, x, rate, shape)


_SEED_LEVELS = 2**24  # a seed is rare, so its probability needs more digits than a rate


def drop_block(
    key: Key[Array, ''], x: Float[Array, 'b h w c'], rate: float | Float[Array, ''], side: int = 7
) -> Float[Array, 'b h w c']:
    """Sets k×k squares of each channel to zero and scales the rest to make up for it.

    y = x · m · count(m) / Σm,   γ = r/k² · h·w / ((h − k + 1)·(w − k + 1))

    Each position at which a square fits becomes the corner of a dropped one with probability γ; m
    is 0 in their union, and its count runs over the whole batch. Squares overlap, so the share
    dropped stays below r: pixel (i,j), on which n positions bear, is kept with probability
    (1 − γ)ⁿ. Rate 0 is the identity, bit for bit; if all is dropped, y is 0.

    Args:
        key: Random key; the same key gives the same mask.
        x: Feature maps.
        rate: r, 0 to 1; traced or not, the computation is the same. γ is at most 1.
        side: k, in pixels; clipped to the height and the width.

    Source: Ghiasi et al. 2018, "DropBlock", algorithm 1, with a mask for each channel. There a
    seed is the centre of its square, which for odd k is the same distribution.
    """
    height, width = x.shape[1:3]
    sides = min(side, height), min(side, width)
    places = height - sides[0] + 1, width - sides[1] + 1
    gamma = jnp.asarray(rate, jnp.float32) * (height * width)
    gamma = jnp.minimum(gamma / (sides[0] * sides[1] * places[0] * places[1]), 1)
    threshold = jnp.round(gamma * _SEED_LEVELS).astype(jnp.uint32)
    corners = random_bits(key, (x.shape[0], *places, x.shape[3])) >> 8 < threshold
    dropped = _spread(materialize(_spread(materialize(corners), 1, sides[0])), 2, sides[1])

    compute = jnp.promote_types(x.dtype, jnp.float32)
    kept = ~materialize(dropped)
    scale = x.size / jnp.maximum(jnp.sum(kept, dtype=jnp.int32), 1).astype(compute)
    return jnp.where(kept, x.astype(compute) * scale, 0).astype(x.dtype)


def _spread(mask: Bool[Array, 'b h w c'], axis: int, side: int) -> Bool[Array, 'b h2 w2 c']:
    """Each True becomes a run of `side` from there on; the axis grows by side − 1."""
    mask = _moved(mask, axis, 0, side - 1)
    run = 1
    while run < side:  # runs of any length from few shifts: 1, 2, 4, … and what is left
        step = min(run, side - run)
        mask, run = mask | _moved(mask, axis, step, -step), run + step
    return mask


def _moved(mask: Array, axis: int, before: int, after: int) -> Array:
    widths = [(before, after, 0) if a == axis else (0, 0, 0) for a in range(mask.ndim)]
    return lax.pad(mask, False, widths)


def stochastic_depth(
    key: Key[Array, ''], x: Float[Array, 'b ...'], rate: float | Float[Array, '']
) -> Float[Array, 'b ...']:
    """Sets the branch x of each example to zero with probability r, divides the others by 1 − r.

    y[b] = x[b] · m[b] / (1 − r), m ~ Bernoulli(1 − r); the layer's output is shortcut + y.

    Huang et al. do not divide in training and multiply by 1 − r at inference. Divided, the branch
    has the same mean in training and inference needs no rate; the two are the same but for the
    scale in which the branch's last layer learns. Arguments and exactness as in `dropout`.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """
    return dropout(key, x, rate, (x.shape[0], *(1,) * (x.ndim - 1)))


def depth_rate(rate: float | Float[Array, ''], number: int, count: int) -> float | Float[Array, '']:
    """The rate of branch `number` of `count`, from 1: r_l = r · l / L.

    Source: Huang et al. 2016, equation 4, with r = 1 − p_L.
    """
    return rate * (number / count)


def normal(key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
    """Standard normal numbers by inversion, z = √2 · erf⁻¹(u), float32.

    u takes 2²³ equidistant values that lie symmetrically in (−1, 1), so |z| is below 5.3. Made of
    `random_bits`, for the reason given there; the same key gives the same numbers.
    """
    steps = (random_bits(key, shape) >> 9).astype(jnp.float32)
    return jnp.sqrt(2.0).astype(jnp.float32) * lax.erf_inv((steps + 0.5) * 2.0**-22 - 1)


def gaussian_dropout(
    key: Key[Array, ''], x: Float[Array, '... c'], rate: float | Float[Array, '']
) -> Float[Array, '... c']:
    """Multiplies each element by a normal number whose variance is that of dropout.

    y = x · (1 + √(r/(1 − r)) · z), z ~ N(0, 1); so E[y] = x and Var[y] = x² · r / (1 − r).

    Args:
        key: Random key; the same key gives the same noise.
        x: input.
        rate: r, 0 up to but not including 1; traced or not. 0 is the identity, bit for bit.

    Source: Srivastava et al. 2014, "Dropout", section 10; the variance as in Keras's
    `GaussianDropout`.
    """
    rate = jnp.asarray(rate, jnp.float32)
    factor = 1 + jnp.sqrt(rate / (1 - rate)) * normal(key, x.shape)
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor).astype(x.dtype)


def add_noise(
    key: Key[Array, ''], x: Float[Array, '...'], deviation: float | Float[Array, '']
) -> Float[Array, '...']:
    """Adds a normal number to each element.

    y = x + σ·z, z ~ N(0, 1)

    At σ = 0, y is x and nothing is drawn: which it is, the running program decides, so that one
    compilation serves every σ at no cost to runs without noise.

    Args:
        key: Random key; the same key gives the same noise.
        x: input.
        deviation: σ, at least 0, in units of x; traced or not.

    Source: Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization".
    """

    def noisy(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (wide + deviation * normal(key, x.shape)).astype(x.dtype)

    return lax.cond(jnp.asarray(deviation) > 0, noisy, lambda x: x, x)
