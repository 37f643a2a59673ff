"""An encoded image (PNG, JPEG, WebP, BMP, GIF) to uint8 pixels, the same on every machine.

The rule, which `RULE` numbers (a change of it makes cached pixels stale):

- EXIF orientation is applied; of an animation the first frame is taken; colour profiles are not
  applied.
- Grey stays one channel; palette, CMYK and YCbCr become RGB.
- Transparent pixels are composited on white.
- 16 bits a channel keep the high byte, as libpng's `png_set_strip_16` does.
"""

import io
import os
import stat
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

RULE = 1
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif')
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF')
# Pillow's own limit (256 MB as RGB), fixed here so that no global setting changes the data.
MAX_PIXELS = 89_478_485
MAX_BYTES = 1 << 30  # more than any image of MAX_PIXELS takes
GREY = ('1', 'L', 'LA', 'I', 'I;16', 'I;16L', 'I;16B')
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class CorruptImage(ValueError):
    """The bytes are not a readable image; the message says why."""


def read_file(path: Path) -> bytes:
    """The bytes of an image file; a link is followed to whatever file it names.

    Errors:
        CorruptImage: It is a pipe, a device or a folder, which might never end, or is larger
            than `MAX_BYTES`; nothing is read then.
        OSError: It cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CorruptImage('not a regular file')
    if status.st_size > MAX_BYTES:
        raise CorruptImage(f'{status.st_size:,} bytes are more than {MAX_BYTES:,}')
    return path.read_bytes()


def decode(data: bytes) -> UInt8[np.ndarray, 'h w c']:
    """The pixels of an encoded image, height × width × 1 (grey) or 3 (RGB).

    Errors:
        CorruptImage: The bytes are damaged, cut off, of another format, or announce more than
            `MAX_PIXELS` pixels (nothing is decoded then).
    """
    return _read(data, _pixels)


def examine(data: bytes) -> tuple[int, int, int]:
    """`decode(data).shape`, or its error; of JPEG all bytes are read but few pixels made.

    Whatever `decode` refuses is refused here too, so that a set leaves out the same images
    whether it is streamed or decoded at once.
    """
    return _read(data, _shape)


def with_channels(
    image: UInt8[np.ndarray, 'h w c'], channels: int
) -> UInt8[np.ndarray, 'h w channels']:
    """The image with 1 or 3 channels: grey is repeated; RGB becomes ITU-R 601 luma."""
    from PIL import Image

    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    return np.asarray(Image.fromarray(image).convert('L'))[..., None]


def _read(data: bytes, then):
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise CorruptImage(f'{width}×{height} pixels are more than {MAX_PIXELS:,}')
            return then(image)
    except CorruptImage:
        raise
    except Image.UnidentifiedImageError:
        raise CorruptImage(f'not an image in {", ".join(FORMATS)} format') from None
    except Exception as error:  # damaged bytes make decoders raise anything
        raise CorruptImage(str(error) or type(error).__name__) from error


def _pixels(image) -> np.ndarray:
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    grey = image.mode in GREY
    if image.mode.startswith('I'):
        return _high_byte(np.asarray(image), image.info.get('transparency'))
    if image.has_transparency_data:
        rgba = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    pixels = np.asarray(image.convert('L' if grey else 'RGB'))
    return pixels[..., None] if grey else pixels


def _high_byte(deep: np.ndarray, transparent: int | None) -> np.ndarray:
    pixels = (deep >> 8).astype(np.uint8)
    if transparent is not None:
        pixels[deep == transparent] = 255
    return pixels[..., None]


def _shape(image) -> tuple[int, int, int]:
    from PIL import ExifTags

    width, height = image.size
    if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
        width, height = height, width
    image.draft(image.mode, (1, 1))  # JPEG decodes at an eighth of the size; others ignore it
    return height, width, _pixels(image).shape[-1]
