"""Random changes to training images, on the device, keyed by example.

The key depends on the example's index in the source, so the batch, the process and the device
change nothing. An `Augment` is a bound one: a field that is off is the number 0 and is not compiled
in; one that is on may be traced, and then 0 changes no bit (`cnn_jax.config.is_on`).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Key, UInt8

from cnn_jax.config import Augment, is_on
from cnn_jax.data import policies

Images = Float[Array, 'b h w c']
Lambdas = Float[Array, ' b']
JITTERS = 'brightness', 'contrast', 'saturation'
# Each change draws from a key of its own, so none depends on whether the others are on. A number
# is part of every result ever reported; flip, crop and cutout share the key without one.
STREAMS = {
    'rotation': 16,
    'erasing': 17,
    'colour': 18,
    'randaugment': 19,
    'trivialaugment': 20,
    'mix': 21,
}


def augment_and_normalize(
    augment: Augment,
    key: Key[Array, ''],
    images: UInt8[Array, 'b h w c'],
    index: Int32[Array, ' b'],
    normalize: Callable[[UInt8[Array, 'b h w c']], Float[Array, 'b h w d']],
) -> Float[Array, 'b h w d']:
    """Return the network's input: colours changed, normalized, then changed in the plane.

    Args:
        augment: The bound settings.
        key: The key of the seed and the step.
        images, index: The examples, and their positions in the source.
        normalize: The function from uint8 images to the network's floats, whose mean is 0.
    """
    images = augment_uint8(augment, key, images, index)
    return augment_plane(augment, key, normalize(images), index)


def augment_uint8(augment: Augment, key: Key[Array, ''], images: Array, index: Array) -> Array:
    """Apply RandAugment, TrivialAugment and colour jitter; arguments: `augment_and_normalize`."""
    jitters = {n: getattr(augment, n) for n in JITTERS if is_on(getattr(augment, n))}

    def one(image, index):
        if is_on(augment.randaugment):
            k, count = example_key(key, index, 'randaugment'), augment.randaugment_operations
            image = policies.rand_augment(k, image, count, augment.randaugment)
        if is_on(augment.trivialaugment):
            k = example_key(key, index, 'trivialaugment')
            image = policies.trivial_augment(k, image, augment.trivialaugment)
        if jitters:
            k, pixels = example_key(key, index, 'colour'), image.astype(jnp.float32)
            image = policies.as_type(policies.jitter(k, pixels, **jitters), image.dtype)
        return image

    return jax.vmap(one)(images, index)


def augment_plane(augment: Augment, key: Key[Array, ''], images: Images, index: Array) -> Images:
    """Apply flip, rotation, pad-and-crop, cutout and erasing, in this order.

    - flip: left to right, with probability 1/2.
    - rotation: about the centre, by an angle uniform in ±rotation, bilinear, corners 0.
    - crop: pad by `crop` pixels on each side, then cut a window of the old size at a uniformly
      random position (He et al. 2016, Deep residual learning, section 4.2).
    - cutout: a square of side `cutout` pixels, its centre uniform over the image, cut off at the
      borders, becomes 0 (DeVries & Taylor 2017, Improved regularization of CNNs with cutout).
    - erasing: see `erase`.

    Arguments as in `augment_and_normalize`, but images are normalized.
    """

    def one(image, index):
        bits = jax.random.bits(jax.random.fold_in(key, index), (5,))
        if augment.flip:
            image = jnp.where(bits[0] % 2 == 1, image[:, ::-1], image)
        if is_on(augment.rotation):
            k = example_key(key, index, 'rotation')
            angle = augment.rotation * (2 * jax.random.uniform(k) - 1)
            image = policies.affine(image, policies.rotation(angle))
        if augment.crop:
            pad, places = augment.crop, 2 * augment.crop + 1
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            start = _below(places, bits[1]), _below(places, bits[2]), 0
            image = lax.dynamic_slice(padded, start, image.shape)
        if augment.cutout:
            side, centre = augment.cutout, [_below(n, b) for n, b in zip(image.shape, bits[3:])]
            rows, columns = (_interval(c - side // 2, side, n) for c, n in zip(centre, image.shape))
            image = jnp.where((rows[:, None] & columns[None])[..., None], 0, image)
        if is_on(augment.erasing):
            image = erase(augment, example_key(key, index, 'erasing'), image)
        return image

    return jax.vmap(one)(images, index)


def example_key(key: Key[Array, ''], index: Int32[Array, ''], stream: str) -> Key[Array, '']:
    """The key of one example for one of `STREAMS`."""
    return jax.random.fold_in(jax.random.fold_in(key, index), STREAMS[stream])


def _below(n: int, bits: Array) -> Array:
    """Uniform in 0…n−1, with a bias of at most n/2³²."""
    return (bits % n).astype(jnp.int32)


def _interval(first: Array, count: Array | int, size: int) -> Array:
    """A mask of the pixels first, …, first + count − 1 of an axis."""
    pixel = jnp.arange(size, dtype=first.dtype)
    return (first <= pixel) & (pixel < first + count)


def erase(
    augment: Augment, key: Key[Array, ''], image: Float[Array, 'h w c']
) -> Float[Array, 'h w c']:
    """Set a random rectangle to 0, the mean, with probability `augment.erasing`.

    height = √(s·h·w·a), width = √(s·h·w / a), rounded; s ~ U(erase_least, erase_most),
    log a ~ U(log erase_aspect, −log erase_aspect), its position uniform over where it fits

    Deviations from the paper's RE-M: it draws again until the rectangle fits, here a is drawn from
    where it does; a is log-uniform as in torchvision, so that tall and wide are equally likely.

    Source: Zhong et al. 2020, "Random erasing data augmentation".
    """
    height, width, _ = image.shape
    least, most, least_aspect = augment.erase_least, augment.erase_most, augment.erase_aspect
    happens, size, shape, vertical, horizontal = jax.random.uniform(key, (5,))
    fraction = jnp.maximum(least + size * (most - least), 1e-6)
    low = jnp.log(jnp.maximum(least_aspect, fraction * height / width))
    high = jnp.log(jnp.minimum(1 / least_aspect, height / (fraction * width)))
    aspect = jnp.exp(low + shape * (high - low))
    area = fraction * height * width
    rows = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 0, height)
    columns = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 0, width)
    vertical = _interval(jnp.floor(vertical * (height - rows + 1)), rows, height)
    horizontal = _interval(jnp.floor(horizontal * (width - columns + 1)), columns, width)
    inside = (vertical[:, None] & horizontal[None])[..., None]
    return jnp.where(inside & (happens < augment.erasing), 0, image)


def normalize(
    images: UInt8[Array, 'b h w c'],
    mean: Float[Array, ' c'],
    std: Float[Array, ' c'],
    dtype=jnp.float32,
) -> Float[Array, 'b h w c']:
    """Normalize: (x/255 − mean) / std, mean and std of pixels in [0, 1]; computed in float32."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    scale, shift = 1 / (255 * std), mean / std
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)


def mix(
    augment: Augment,
    key: Key[Array, ''],
    images: Images,
    labels: Int[Array, ' b'],
    index: Int32[Array, ' b'],
) -> tuple[Images, Int[Array, ' b'], Lambdas]:
    """Mix each image with another of its batch, by mixup or by CutMix, one of which is on.

    The loss of an example is λ·ℓ(label) + (1 − λ)·ℓ(other label).

    λ ~ Beta(α, α) for mixup; for CutMix it is what is left after a rectangle of about 1 − λ of
    the pixels. With α = 0 nothing changes, not a bit, and λ is 1. Where both are on, a coin
    decides for each example. λ is drawn for each example, as the papers' equations have it.

    Args:
        augment, key, images, index: As in `augment_plane`; `mixup` and `cutmix` are α.
        labels: Class numbers.

    Returns:
        The mixed images; the labels of the partners; λ, in [0, 1].

    Source: Zhang et al. 2018, "mixup: beyond empirical risk minimization"; Yun et al. 2019,
    "CutMix".
    """
    k_partner, k_lam, k_box, k_coin = jax.vmap(
        lambda i: jax.random.split(example_key(key, i, 'mix'), 4), out_axes=1
    )(index)
    partner = partners(k_partner)
    others, other_labels = images[partner], labels[partner]
    if not is_on(augment.cutmix):
        lam = sample_lambda(k_lam, augment.mixup)
        return mixup(images, others, lam), other_labels, lam
    cut, lam_cut = cutmix(k_box, images, others, sample_lambda(k_lam, augment.cutmix))
    if not is_on(augment.mixup):
        return cut, other_labels, lam_cut
    lam = sample_lambda(k_lam, augment.mixup)
    heads = jax.vmap(jax.random.bernoulli)(k_coin)
    mixed = jnp.where(heads[:, None, None, None], cut, mixup(images, others, lam))
    return mixed, other_labels, jnp.where(heads, lam_cut, lam)


def partners(keys: Key[Array, ' b']) -> Int32[Array, ' b']:
    """Another example for each: the next in a random cycle through the whole batch."""
    bits = jax.vmap(jax.random.bits)(keys)
    order = jnp.argsort(bits)
    return jnp.zeros_like(order).at[order].set(jnp.roll(order, -1))


def sample_lambda(keys: Key[Array, ' b'], alpha: Array | float) -> Lambdas:
    """Draw λ ~ Beta(α, α); 1 for α = 0.

    From uniform u: Y = 1/2 + 1/2·√(1 − u₁^(2/(2α+1)))·cos 2πu₂ is Beta(α + 1, α + 1), and
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


def mixup(images: Images, others: Images, lam: Lambdas) -> Images:
    """Mix linearly: λ·x + (1 − λ)·other."""
    weight = lam.astype(images.dtype)[:, None, None, None]
    return jnp.where(weight == 1, images, weight * images + (1 - weight) * others)


def cutmix(
    keys: Key[Array, ' b'], images: Images, others: Images, lam: Lambdas
) -> tuple[Images, Lambdas]:
    """Replace a rectangle of each image by the other's pixels.

    Its sides are ⌊h·√(1 − λ)⌋ and ⌊w·√(1 − λ)⌋, its centre uniform over the image, and it is cut
    off at the borders. Also returned is the exact fraction of pixels that each keeps.
    """
    _, *size, _ = images.shape

    def inside(key, lam):
        sides = [jnp.floor(n * jnp.sqrt(1 - lam)) for n in size]
        centre = [jnp.floor(draw * n) for draw, n in zip(jax.random.uniform(key, (2,)), size)]
        rows, columns = (_interval(c - s // 2, s, n) for c, s, n in zip(centre, sides, size))
        return rows[:, None] & columns[None]

    cut = jax.vmap(inside)(keys, lam)
    own = (math.prod(size) - cut.sum(axis=(1, 2))).astype(jnp.float32) / math.prod(size)
    return jnp.where(cut[..., None], others, images), own
