"""Bringing decoded images to one size, on the host: the same pixels on every device."""

import numpy as np
from jaxtyping import UInt8

from cnn_jax.data.decode import with_channels
from cnn_jax.data.source import Source
from cnn_jax.errors import UserError


def prepare(
    image: UInt8[np.ndarray, 'h w c'], resize: str = 'none', size: int = 0, channels: int = 0
) -> UInt8[np.ndarray, 'size size channels']:
    """One image with the wanted channels and size.

    Scaling is Pillow's bilinear filter, whose support grows with the reduction, so that nothing
    aliases.

    Args:
        image: Of any size, with 1 or 3 channels.
        resize: none (as it is), stretch (each side scaled on its own), or crop (the short side
            scaled to `size`, then the centre square).
        size: Height and width of the result, in pixels.
        channels: 1 or 3; 0 keeps the image's.
    """
    from PIL import Image, ImageOps

    image = with_channels(image, channels or image.shape[-1])
    if resize == 'none' or image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if resize == 'stretch':
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    else:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, image.shape[-1])


def image_shape(
    source: Source, resize: str = 'none', size: int = 0, channels: int = 0
) -> tuple[int, int, int]:
    """Height, width and channels of every `prepare`d image of `source`.

    Errors:
        UserError: `resize` is none, and images differ in size; two of them are named.
    """
    channels = channels or source.channels
    if resize != 'none':
        return size, size, channels
    other = np.flatnonzero((source.sizes != source.sizes[0]).any(axis=1))
    if len(other):
        first, second = (
            f'{source.describe(i)} is {source.sizes[i][1]}×{source.sizes[i][0]}'
            for i in (0, int(other[0]))
        )
        raise UserError(
            f'the images of {source.name} differ in size ({first}, {second} pixels); set '
            'config.data.resize to stretch or crop and config.data.size to the size in pixels'
        )
    height, width = source.sizes[0].tolist()
    return height, width, channels
