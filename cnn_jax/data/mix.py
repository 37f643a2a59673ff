"""Mixup and CutMix: two images of a batch become one, and so do their labels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Key

from cnn_jax.config import Augment
from cnn_jax.data.augment import example_key

Images = Float[Array, 'b h w c']
Shares = Float[Array, ' b']


def mix(
    on: Augment,
    strengths: Augment,
    key: Key[Array, ''],
    images: Images,
    labels: Int[Array, ' b'],
    index: Int32[Array, ' b'],
) -> tuple[Images, Int[Array, ' b'], Shares]:
    """Each image mixed with another of its batch, by mixup or by CutMix.

    The loss of an example is share·ℓ(label) + (1 − share)·ℓ(other label).

    The share is λ ~ Beta(α, α) for mixup; for CutMix it is what is left after a rectangle of
    about 1 − λ of the pixels. With α = 0 nothing changes, not a bit, and the share is 1. Where
    both are on, a coin decides for each example.

    λ is drawn for each example, as the equations of both papers have it; their code draws one
    for a batch, which has the same mean and more noise. It follows from the example's index; the
    partner follows from the batch's examples, not from their order.

    Args:
        on: Says whether mixup or CutMix is on; one of them is.
        strengths: The same with traced values: `mixup` and `cutmix` are α.
        key: Folded with the seed and the step, not with anything of the batch.
        images: Prepared, and augmented as each is alone.
        labels: Class numbers.
        index: The examples' positions in the source.

    Returns:
        The mixed images; the labels of the partners; the share of the own label, in [0, 1].

    Source: Zhang et al. 2018, "mixup: beyond empirical risk minimization"; Yun et al. 2019,
    "CutMix".
    """
    of_partner, of_share, of_place, of_coin = jax.vmap(
        lambda i: jax.random.split(example_key(key, i, 'mix'), 4), out_axes=1
    )(index)
    partner = partners(of_partner)
    others, other_labels = images[partner], labels[partner]
    if not on.cutmix:
        share = shares(of_share, strengths.mixup)
        return mixup(images, others, share), other_labels, share
    cut, kept = cutmix(of_place, images, others, shares(of_share, strengths.cutmix))
    if not on.mixup:
        return cut, other_labels, kept
    share = shares(of_share, strengths.mixup)
    heads = jax.vmap(jax.random.bernoulli)(of_coin)
    mixed = jnp.where(heads[:, None, None, None], cut, mixup(images, others, share))
    return mixed, other_labels, jnp.where(heads, kept, share)


def partners(keys: Key[Array, ' b']) -> Int32[Array, ' b']:
    """For each example another one: the next in a random cycle through the whole batch.

    A permutation in which nothing stays in its place, from two examples on.
    """
    bits = jax.vmap(jax.random.bits)(keys)
    order = jnp.argsort(bits)
    return jnp.zeros_like(order).at[order].set(jnp.roll(order, -1))


def shares(keys: Key[Array, ' b'], alpha: Array | float) -> Shares:
    """λ ~ Beta(α, α); 1 for α = 0.

    Without a loop, for any α > 0, from uniform u: with cos = cos 2πu₂,
    Y = 1/2 + 1/2·√(1 − u₁^(2/(2α+1)))·cos is Beta(α + 1, α + 1), and
    logit λ = logit Y + (log u₃ − log u₄)/α.

    Source: Ulrich 1984, "Computer generation of distributions on the m-sphere", for Y; Devroye
    1986, "Non-uniform random variate generation", IX.3.5, for Gamma(α) = Gamma(α + 1)·u^(1/α).
    """
    alpha = jnp.asarray(alpha, jnp.float32)
    positive = jnp.where(alpha > 0, alpha, 1.0)

    def one(key):
        u1, u2, u3, u4 = jax.random.uniform(key, (4,), minval=1e-30)
        radius = jnp.sqrt(1 - u1 ** (2 / (2 * positive + 1)))
        cos = radius * jnp.cos(2 * jnp.pi * u2)
        logit = jnp.log1p(cos) - jnp.log1p(-cos) + (jnp.log(u3) - jnp.log(u4)) / positive
        return jnp.where(alpha > 0, jax.nn.sigmoid(logit), 1.0)

    return jax.vmap(one)(keys)


def mixup(images: Images, others: Images, share: Shares) -> Images:
    """λ·x + (1 − λ)·other."""
    weight = share.astype(images.dtype)[:, None, None, None]
    return jnp.where(weight == 1, images, weight * images + (1 - weight) * others)


def cutmix(
    keys: Key[Array, ' b'], images: Images, others: Images, share: Shares
) -> tuple[Images, Shares]:
    """A rectangle of the other image in place of the own pixels.

    Its sides are ⌊h·√(1 − λ)⌋ and ⌊w·√(1 − λ)⌋, its centre uniform over the image, and it is cut
    off at the borders.

    Returns:
        The images, and the exact share of pixels that each keeps, in place of λ.
    """
    _, height, width, _ = images.shape

    def inside(key, share):
        vertical, horizontal = jax.random.uniform(key, (2,))
        rows = _interval(vertical, jnp.sqrt(1 - share), height)
        columns = _interval(horizontal, jnp.sqrt(1 - share), width)
        return rows[:, None] & columns[None, :]

    cut = jax.vmap(inside)(keys, share)
    kept = (height * width - cut.sum(axis=(1, 2))).astype(jnp.float32) / (height * width)
    return jnp.where(cut[..., None], others, images), kept


def _interval(draw: Array, share: Array, size: int) -> Array:
    """Which of the pixels of an axis lie in an interval about a random centre."""
    side = jnp.floor(size * share)
    first = jnp.floor(draw * size) - side // 2
    place = jnp.arange(size, dtype=jnp.float32)
    return (first <= place) & (place < first + side)
