"""Random changes to training images, on the device, keyed by example.

The key of an example depends on its index and not on its place in a batch, so an image is changed
in the same way whatever the batch size, the process or the device that it lands on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Key, Num, UInt8

from cnn_jax.config import Augment
from cnn_jax.data import policies

Number = Float[Array, ''] | float


class Erasing(NamedTuple):
    """Of random erasing, all numbers; defaults are the paper's."""

    rate: Number = 0.5  # probability that an image is erased at all
    least: Number = 0.02  # area, as a share of the image's
    most: Number = 0.4
    aspect: Number = 0.3  # least height : width; the largest is its inverse


def erase(
    key: Key[Array, ''],
    image: Num[Array, 'h w c'],
    erasing: Erasing,
    fill: Num[Array, '1 1 c'],
) -> Num[Array, 'h w c']:
    """With a probability, sets a rectangle to the mean.

    height = √(s·h·w·a), width = √(s·h·w / a), rounded; s ~ U(least, most),
    log a ~ U(log aspect, −log aspect), its place uniform over where it fits

    Deviations: the paper draws again until the rectangle fits, here a is drawn from where it
    does; a is log-uniform as in torchvision, so that tall and wide are equally likely; the
    paper's variant RE-M (the mean), for random pixels have no right scale in all
    preprocessings.

    Source: Zhong et al. 2020, "Random erasing data augmentation".
    """
    height, width, _ = image.shape
    happens, size, shape, vertical, horizontal = jax.random.uniform(key, (5,))
    share = jnp.maximum(erasing.least + size * (erasing.most - erasing.least), 1e-6)
    low = jnp.log(jnp.maximum(erasing.aspect, share * height / width))
    high = jnp.log(jnp.minimum(1 / erasing.aspect, height / (share * width)))
    aspect = jnp.exp(low + shape * (high - low))
    area = share * height * width
    tall = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 0, height)
    wide = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 0, width)
    top = jnp.floor(vertical * (height - tall + 1))
    left = jnp.floor(horizontal * (width - wide + 1))
    row = jnp.arange(height, dtype=jnp.float32)[:, None, None]
    column = jnp.arange(width, dtype=jnp.float32)[None, :, None]
    inside = (top <= row) & (row < top + tall) & (left <= column) & (column < left + wide)
    return jnp.where(inside & (happens < erasing.rate), fill, image)


# Each draws from a key of its own, so none depends on whether the others are on. A number is
# part of every result ever reported; flip, crop and cutout share the key without one.
STREAMS = {
    'rotation': 16,
    'erasing': 17,
    'colour': 18,
    'randaugment': 19,
    'trivialaugment': 20,
    'mix': 21,
}


def shown(
    on: Augment,
    strengths: Augment,
    key: Key[Array, ''],
    images: UInt8[Array, 'b h w c'],
    index: Int32[Array, ' b'],
    prepare: Callable[[UInt8[Array, 'b h w c']], Float[Array, 'b h w d']],
) -> Float[Array, 'b h w d']:
    """What the network is shown of images: colours changed, prepared, then changed in the plane.

    Colour, and the policies, act on 8-bit pixels; flip, rotation, crop, cutout and erasing on
    normalized ones, where the mean that they fill with is 0.

    Args:
        on: Says which changes are on.
        strengths: The same with traced values.
        key: Folded with the seed and the step, not with anything of the batch.
        images: As the source has them.
        index: The examples' positions in the source.
        prepare: From uint8 images to the network's floats.
    """
    images = prepare(recoloured(on, strengths, key, images, index))
    erasing = Erasing(
        strengths.erasing, strengths.erase_least, strengths.erase_most, strengths.erase_aspect
    )
    return augment(
        key,
        images,
        index,
        flip=on.flip,
        crop=on.crop,
        cutout=on.cutout,
        rotation=strengths.rotation if on.rotation else None,
        erasing=erasing if on.erasing else None,
    )


def recoloured(
    on: Augment,
    strengths: Augment,
    key: Key[Array, ''],
    images: UInt8[Array, 'b h w c'],
    index: Int32[Array, ' b'],
) -> UInt8[Array, 'b h w c']:
    """8-bit images after RandAugment, TrivialAugment and colour jitter; arguments as in `shown`."""

    def one(image, index):
        if on.randaugment:
            k = example_key(key, index, 'randaugment')
            image = policies.rand_augment(
                k, image, on.randaugment_operations, strengths.randaugment
            )
        if on.trivialaugment:
            k = example_key(key, index, 'trivialaugment')
            image = policies.trivial_augment(k, image, strengths.trivialaugment)
        if any(getattr(on, name) for name in policies.JITTERS):
            k = example_key(key, index, 'colour')
            chosen = {n: getattr(strengths, n) for n in policies.JITTERS if getattr(on, n)}
            pixels = policies.jitter(k, image.astype(jnp.float32), **chosen)
            image = policies.as_type(pixels, image.dtype)
        return image

    return jax.vmap(one)(images, index)


def augment(
    key: Key[Array, ''],
    images: Num[Array, 'b h w c'],
    index: Int32[Array, ' b'],
    *,
    flip: bool = False,
    crop: int = 0,
    cutout: int = 0,
    rotation: Float[Array, ''] | float | None = None,
    erasing: Erasing | None = None,
    fill: Num[Array, ' c'] | float = 0,
) -> Num[Array, 'b h w c']:
    """Flip, rotation, pad-and-crop, cutout, erasing, in this order; what is off costs nothing.

    - flip: with probability 1/2.
    - rotation: about the centre, by an angle uniform in ±rotation, bilinear, corners `fill`.
    - crop: pad by `crop` pixels on each side, then cut a window of the old size at a uniformly
      random place (He et al. 2016, Deep residual learning, section 4.2).
    - cutout: a square of side `cutout` pixels, its centre uniform over the image, cut off at the
      borders, becomes `fill` (DeVries & Taylor 2017, Improved regularization of CNNs with cutout).
    - erasing: see `erase`.

    Args:
        key: Folded with the seed and the step, not with anything of the batch.
        images: uint8 or float; normalized ones for the published zero padding.
        index: The examples' positions in the source.
        flip: Whether to flip at all.
        crop: Padding, in pixels.
        cutout: Side of the square, in pixels.
        rotation: Largest angle, in degrees; 0 changes no bit, None is off.
        erasing: Its numbers; a rate of 0 changes no bit, None is off.
        fill: The channel mean in the images' units, a number or one a channel; of normalized
            images it is 0.

    Returns:
        Images of the same shape and type.
    """
    fill = jnp.broadcast_to(jnp.asarray(fill, images.dtype), (1, 1, images.shape[-1]))

    def one(image, index):
        # Each change has bits of its own, so none depends on whether the others are on.
        bits = jax.random.bits(jax.random.fold_in(key, index), (5,))
        if flip:
            image = jnp.where(bits[0] % 2 == 1, image[:, ::-1], image)
        if rotation is not None:
            image = _rotated(example_key(key, index, 'rotation'), image, rotation, fill)
        if crop:
            image = _crop(bits[1], bits[2], image, crop, fill)
        if cutout:
            image = _cut_out(bits[3], bits[4], image, cutout, fill)
        if erasing is not None:
            image = erase(example_key(key, index, 'erasing'), image, erasing, fill)
        return image

    return jax.vmap(one)(images, index)


def example_key(key: Key[Array, ''], index: Int32[Array, ''], stream: str) -> Key[Array, '']:
    """The key of one example for one of `STREAMS`."""
    return jax.random.fold_in(jax.random.fold_in(key, index), STREAMS[stream])


def _rotated(key: Array, image: Array, degrees, fill: Array) -> Array:
    angle = degrees * (2 * jax.random.uniform(key) - 1)
    return policies.affine(image, policies.rotation(angle), fill)


def _crop(row_bits: Array, column_bits: Array, image: Array, pad: int, fill: Array) -> Array:
    height, width, channels = image.shape
    padded = jnp.broadcast_to(fill, (height + 2 * pad, width + 2 * pad, channels))
    padded = lax.dynamic_update_slice(padded, image, (pad, pad, 0))
    top, left = _below(2 * pad + 1, row_bits), _below(2 * pad + 1, column_bits)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _cut_out(row_bits: Array, column_bits: Array, image: Array, side: int, fill: Array) -> Array:
    height, width, _ = image.shape
    top, left = _below(height, row_bits) - side // 2, _below(width, column_bits) - side // 2
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (top <= row) & (row < top + side) & (left <= column) & (column < left + side)
    return jnp.where(inside, fill, image)


def _below(n: int, bits: Array) -> Array:
    """Uniform in 0…n−1, with a bias of at most n/2³²."""
    return (bits % n).astype(jnp.int32)


def normalize(
    images: UInt8[Array, 'b h w c'],
    mean: Float[Array, ' c'],
    std: Float[Array, ' c'],
    dtype=jnp.float32,
) -> Float[Array, 'b h w c']:
    """(x/255 − mean) / std, with mean and std of pixels in [0, 1]; computed in float32."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    scale, shift = 1 / (255 * std), mean / std
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)


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
