"""Encoded images (PNG, JPEG, TIFF, HEIC, …) to uint8 pixels, alike on every machine.

The rule of decoding, which `RULE` numbers (a change of it makes cached pixels stale):

- EXIF orientation is applied; colour profiles are not. The first frame or page counts.
- Grey stays one channel, also by a palette; colours by a palette, CMYK, LAB and YCbCr become RGB.
- Transparent pixels are composited on white.
- Of more than 8 bits a channel the highest 8 are kept, as libpng's `png_set_strip_16` does; floats
  from 0 to 1 become round(255·x).
- A JPEG of more than `MAX_PIXELS` is decoded at 1/2, 1/4 or 1/8 of its sides.
"""

import functools
import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from cnn_jax.data.source import UNREADABLE, Skipped, Source
from cnn_jax.errors import UserError
from cnn_jax.files import Corrupt, cache_folder, read_json, warn_without_cache, write_json
from cnn_jax.runtime import cores

RULE = 2
HEIC = '.heic', '.heif'
HAS_HEIF = find_spec('pillow_heif') is not None
NO_HEIF = 'HEIC (pip install -r requirements-heic.txt)'  # what is left out, and its cure
SUFFIXES = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.bmp', '.gif'),
    *('.tif', '.tiff', '.avif', *(HEIC if HAS_HEIF else ())),
)
JPEG = ('JPEG', 'MPO')  # MPO: a JPEG with more behind it, such as another view
BITS_PER_SAMPLE = 258  # the tag of a TIFF
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'AVIF', *(('HEIF',) if HAS_HEIF else ()))
# Bounds by memory, of which Pillow takes four bytes a pixel; no global setting changes the data.
MAX_PIXELS = 89_478_485
MAX_WHOLE_PIXELS = 2 * MAX_PIXELS  # of formats that cannot be decoded at less; one at a time
MAX_JPEG_PIXELS = 400_000_000
MAX_BYTES = 1 << 30  # more than any image of these sizes takes
GREY = ('1', 'L', 'LA', 'La')
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
CHUNK = 32  # items a task of `parallel_map`: large enough to hide the cost of handing it over
T = TypeVar('T')
_one_large = threading.Lock()


class CorruptImage(ValueError):
    """The bytes are not a readable image; the message says why."""


def read_file(path: Path) -> bytes:
    """Read an image file, or the one that a link names.

    Errors:
        CorruptImage: It is not a regular file, or larger than `MAX_BYTES`; nothing is read then.
        OSError: It cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CorruptImage('not a regular file')
    if status.st_size > MAX_BYTES:
        raise CorruptImage(f'{status.st_size:,} bytes are more than {MAX_BYTES:,}')
    return path.read_bytes()


def decode(data: bytes) -> UInt8[np.ndarray, 'h w c']:
    """Decode an image to pixels, height × width × 1 (grey) or 3 (RGB).

    Errors:
        CorruptImage: The bytes are damaged, cut off, of another format, or announce too many
            pixels (nothing is decoded then).
    """
    return _read(data, _pixels)


def examine(data: bytes) -> tuple[int, int, int]:
    """Return `decode(data).shape`, or raise its error; few pixels of a JPEG are made."""
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


@functools.cache
def _pillow():
    """Pillow with the bounds above, and silent: what cannot be read is listed."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS
    warnings.filterwarnings('ignore', module=r'PIL\.')
    if HAS_HEIF:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    return Image


def _read(data: bytes, then: Callable[[Any], T]) -> T:
    Image = _pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            jpeg = image.format in JPEG
            limit = MAX_JPEG_PIXELS if jpeg else MAX_WHOLE_PIXELS
            if width * height > limit:
                raise CorruptImage(f'{width}×{height} pixels are more than {limit:,}')
            if width * height <= MAX_PIXELS:
                return then(image)
            if jpeg:
                least = next(n for n in (2, 4, 8) if width // n * (height // n) <= MAX_PIXELS)
                image.draft(None, (width // least, height // least))
            with _one_large:
                return then(image)
    except CorruptImage:
        raise
    except Image.UnidentifiedImageError:
        heic = data[4:11] in (b'ftyphei', b'ftypmif', b'ftyphev') and not HAS_HEIF
        reason = NO_HEIF if heic else f'not an image in {", ".join(FORMATS)} format'
        raise CorruptImage(reason) from None
    except Exception as error:  # damaged bytes make decoders raise anything
        raise CorruptImage(' '.join(str(error).split()) or type(error).__name__) from error


def _pixels(image) -> np.ndarray:
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in 'IF':
        return _deep_pixels(image)
    grey = image.mode in GREY
    if image.mode in ('P', 'PA'):
        colours = np.array(image.getpalette()).reshape(-1, 3)
        grey = bool((colours == colours[:, :1]).all())
    if image.has_transparency_data:
        rgba = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    mode = 'L' if grey else 'RGB'
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if grey else pixels


def _deep_pixels(image) -> np.ndarray:
    """Grey pixels of more than 8 bits, which mode I or F stands for."""
    deep = np.asarray(image)
    low, high = deep.min(), deep.max()
    bits = min(16, *getattr(image, 'tag_v2', {}).get(BITS_PER_SAMPLE, (16,)))
    largest = 1 if image.mode == 'F' else 2**bits - 1
    if not 0 <= low <= high <= largest:
        raise CorruptImage(f'pixels from {low:g} to {high:g} and not from 0 to {largest:,}')
    pixels = np.round(255 * deep) if image.mode == 'F' else deep >> bits - 8
    pixels = pixels.astype(np.uint8)
    if (transparent := image.info.get('transparency')) is not None:
        pixels[deep == transparent] = 255
    return pixels[..., None]


def _shape(image) -> tuple[int, int, int]:
    from PIL import ExifTags

    if image.format not in JPEG:
        return _pixels(image).shape
    width, height = image.size
    if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
        width, height = height, width
    image.draft(image.mode, (1, 1))  # decodes at an eighth of the size
    return height, width, _pixels(image).shape[-1]


def resize_image(
    image: UInt8[np.ndarray, 'h w c'], resize: str = 'none', size: int = 0, channels: int = 0
) -> UInt8[np.ndarray, 'size size channels']:
    """Convert one image to the wanted channels and size, by Pillow's bilinear filter.

    Args:
        image: An image of any size, with 1 or 3 channels.
        resize: none (as it is), stretch (each side scaled to `size` on its own), or crop (the short
            side scaled, then the centre square).
        size: In pixels.
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
    """Height, width and channels of every image of `source` after `resize_image`.

    Errors:
        UserError: `resize` is none, and images differ in size; two of them are named.
    """
    channels, sizes = channels or source.channels, source.sizes
    if resize != 'none':
        return size, size, channels
    other = np.flatnonzero((sizes != sizes[0]).any(axis=1))
    if len(other):
        first, second = (
            f'{source.describe(i)} is {sizes[i][1]}×{sizes[i][0]}' for i in (0, int(other[0]))
        )
        raise UserError(
            f'the images of {source.name} differ in size ({first}, {second} pixels); set '
            'config.data.resize to stretch or crop and config.data.size to the size in pixels'
        )
    height, width = sizes[0].tolist()
    return height, width, channels


class Finding(NamedTuple):
    """The facts of one encoded image; `reason` is '' for a readable one."""

    height: int
    width: int
    channels: int
    reason: str
    sha256: str  # of the encoded bytes


def scan(data: bytes) -> Finding:
    """Examine one encoded image: streamed or decoded at once, a set leaves out the same."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return Finding(*examine(data), '', sha256)
    except CorruptImage as error:
        return Finding(0, 0, 0, str(error), sha256)


def skipped(
    name: str, paths: Sequence[str], findings: Sequence[Finding], max_corrupt: float
) -> Skipped:
    """The paths of unreadable images, with the reasons.

    Errors:
        UserError: They are more than the fraction `max_corrupt`; the first of them are named.
    """
    wrong = [(path, each.reason) for path, each in zip(paths, findings) if each.reason]
    if wrong and len(wrong) / len(paths) > max_corrupt:
        first = '; '.join(f'{path}: {reason}' for path, reason in wrong[:3])
        raise UserError(
            f'{len(wrong)} of the {len(paths)} images of {name} cannot be read ({first}); '
            f'replace or remove them, or raise --config.data.max_corrupt from {max_corrupt:g}'
        )
    return tuple((path, f'{UNREADABLE}: {reason}') for path, reason in wrong)


def load_findings(key: str) -> list[Any]:
    """The rows stored under `key` by the present rule of decoding, or none."""
    try:
        stored = read_json(cache_folder() / 'index' / f'{key}.json')
    except (OSError, Corrupt):
        return []
    return stored['rows'] if stored.get('rule') == _rule() else []


def store_findings(key: str, rows: Sequence[Any]) -> None:
    """Store rows of JSON values under `key`."""
    try:
        write_json(cache_folder() / 'index' / f'{key}.json', {'rule': _rule(), 'rows': rows})
    except OSError as error:
        warn_without_cache(error)


def _rule() -> Any:
    return [RULE, 'HEIF'] if HAS_HEIF else RULE


def parallel_map(function: Callable[[int], T], n: int, label: str) -> list[T]:
    """Compute `[function(0), …, function(n − 1)]` by threads; the first error ends the work."""
    size = max(1, min(CHUNK, -(-n // cores())))
    chunks = [range(start, min(start + size, n)) for start in range(0, n, size)]
    with ThreadPoolExecutor(cores()) as pool:
        done = pool.map(lambda chunk: [function(i) for i in chunk], chunks)
        shown = tqdm(done, label, len(chunks), leave=False, disable=None)
        return [result for chunk in shown for result in chunk]
