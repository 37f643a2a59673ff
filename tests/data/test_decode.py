import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cnn_jax.data.decode import (
    MAX_PIXELS,
    CorruptImage,
    decode,
    examine,
    read_file,
    with_channels,
)
from tests.damage import damaged

grey_images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(1)))
rgb_images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for what Pillow cannot write."""

    def chunk(body: bytes) -> bytes:
        return struct.pack('>I', len(body) - 4) + body + struct.pack('>I', zlib.crc32(body))

    head = b'IHDR' + struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    bodies = [head, *extra, b'IDAT' + zlib.compress(rows), b'IEND']
    return b'\x89PNG\r\n\x1a\n' + b''.join(map(chunk, bodies))


# Lossless formats give back the pixels.


@given(grey_images | rgb_images, st.sampled_from(['PNG', 'BMP']))
def test_lossless_formats_round_trip(image, kind):
    np.testing.assert_array_equal(decode(encoded(picture(image), kind)), image)


def test_lossless_webp_round_trips(random_image):
    image = random_image((13, 7, 3))
    np.testing.assert_array_equal(decode(encoded(picture(image), 'WEBP', lossless=True)), image)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_jpeg_gives_pillows_pixels(mode, random_image):
    data = encoded(Image.fromarray(random_image((16, 24, 3))).convert(mode), 'JPEG')
    expected = np.asarray(Image.open(io.BytesIO(data))).reshape(16, 24, -1)
    np.testing.assert_array_equal(decode(data), expected)


# Every kind of pixel becomes grey or RGB.


def test_black_and_white_is_grey():
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert('1')
    assert decode(encoded(image, 'PNG')).tolist() == [[[0], [255]], [[255], [0]]]


def test_palette_becomes_its_colours():
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    assert decode(encoded(image, 'PNG')).tolist() == [[[200, 100, 0], [10, 20, 30]]]


def test_transparent_pixels_lie_on_white():
    image = Image.new('RGBA', (3, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)])
    assert decode(encoded(image, 'PNG')).tolist() == [[[10, 20, 30], [255] * 3, [127] * 3]]


def test_grey_with_alpha_stays_grey():
    image = Image.new('LA', (3, 1))
    image.putdata([(40, 255), (40, 0), (0, 128)])
    assert decode(encoded(image, 'PNG')).tolist() == [[[40], [255], [127]]]


def test_a_transparent_palette_entry_is_white():
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    data = encoded(image, 'PNG', transparency=1)
    assert decode(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_keep_the_high_byte():
    values = np.array([[0x0000, 0x12FF, 0x8000, 0xFFFF]], np.uint16)
    pixels = decode(encoded(Image.fromarray(values), 'PNG'))
    assert pixels.tolist() == [[[0x00], [0x12], [0x80], [0xFF]]]


def test_sixteen_bit_rgb_keeps_the_high_byte():
    rows = b'\0' + struct.pack('>6H', 0x0000, 0x12FF, 0xFFFF, 0x80FF, 0x00FF, 0x7F00)
    assert decode(png(2, 1, 16, 2, rows)).tolist() == [[[0, 0x12, 0xFF], [0x80, 0, 0x7F]]]


def test_the_transparent_grey_of_sixteen_bits_is_white():
    rows = b'\0' + struct.pack('>2H', 0x1234, 0x1235)
    data = png(2, 1, 16, 0, rows, b'tRNS' + struct.pack('>H', 0x1234))
    assert decode(data).tolist() == [[[255], [0x12]]]


def test_cmyk_becomes_rgb():
    image = Image.new('CMYK', (8, 8), (0, 255, 255, 0))  # magenta and yellow ink: red
    pixels = decode(encoded(image, 'JPEG', quality=100)).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels - [255, 0, 0]).max() <= 3


# Orientation and animation.

ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize('orientation', ORIENTED)
@pytest.mark.parametrize('channels', [1, 3])
def test_exif_orientation_is_applied(orientation, channels, random_image):
    image = random_image((3, 5, channels))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(image), 'PNG', exif=exif)
    np.testing.assert_array_equal(decode(data), ORIENTED[orientation](image))
    assert examine(data) == decode(data).shape


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [Image.new('RGB', (4, 4), colour) for colour in ('red', 'blue')]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert np.unique(decode(data).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


# Damage.


@pytest.mark.parametrize('data', [b'', b'text', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'BM'])
def test_other_bytes_are_corrupt(data):
    with pytest.raises(CorruptImage, match=r'.'):
        decode(data)


def test_a_palette_image_without_a_palette_is_corrupt():
    data = png(2, 1, 8, 3, b'\0\0\1')
    for read in (decode, examine):
        with pytest.raises(CorruptImage, match='AssertionError'):  # Pillow's, without a message
            read(data)


def test_other_formats_are_refused():
    with pytest.raises(CorruptImage, match='not an image in PNG, JPEG, WEBP, BMP, GIF format'):
        decode(encoded(Image.new('L', (2, 2)), 'TIFF'))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'BMP', 'GIF'])
@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
def test_a_truncated_image_is_corrupt(kind, share, random_image):
    data = encoded(Image.fromarray(random_image((32, 32, 3))), kind)
    for read in (decode, examine):
        with pytest.raises(CorruptImage):
            read(data[: int(len(data) * share)])


def whole_images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 17, 3), np.uint8)
    image = Image.fromarray(pixels)
    palette = image.convert('P')
    return [
        *(encoded(image.convert(m), k) for m in ('L', 'RGB') for k in ('PNG', 'JPEG', 'WEBP')),
        *(encoded(palette, kind, transparency=3) for kind in ('PNG', 'GIF', 'WEBP')),
        encoded(image, 'BMP'),
        encoded(image, 'JPEG', progressive=True),
        encoded(palette, 'GIF', save_all=True, append_images=[palette.rotate(90)]),
    ]


@pytest.mark.filterwarnings('ignore')  # Pillow's, of damage that it repairs
@settings(derandomize=True, max_examples=400)
@given(st.sampled_from(whole_images()).flatmap(damaged))
def test_examine_agrees_with_decode_on_damaged_bytes(data):
    try:
        expected = decode(data).shape
    except CorruptImage:
        with pytest.raises(CorruptImage):
            examine(data)
    else:
        assert examine(data) == expected


def test_a_pixel_bomb_is_refused_without_decoding():
    with pytest.raises(CorruptImage, match='pixel'):
        decode(png(60_000, 60_000, 8, 2, b''))


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_the_limit_is_ours_and_not_pillows():
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(CorruptImage, match=f'{side}×{side} pixels are more than 89,478,485'):
        decode(png(side, side, 8, 0, b''))


# Files.


def test_a_file_is_its_bytes(tmp_path):
    (tmp_path / 'image').write_bytes(b'content')
    (tmp_path / 'link').symlink_to('image')
    assert read_file(tmp_path / 'image') == read_file(tmp_path / 'link') == b'content'


def test_what_might_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'device').symlink_to('/dev/zero')
    for path in (tmp_path / 'pipe', tmp_path / 'device', tmp_path):
        with pytest.raises(CorruptImage, match='not a regular file'):
            read_file(path)


def test_what_no_image_is_as_large_as_is_not_read(tmp_path):
    (tmp_path / 'huge').touch()
    os.truncate(tmp_path / 'huge', 1 << 40)
    with pytest.raises(CorruptImage, match='1,099,511,627,776 bytes are more than 1,073,741,824'):
        read_file(tmp_path / 'huge')


# Channels.


def test_rgb_to_grey_is_luma():
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert with_channels(primaries, 1).tolist() == [[[76], [150], [29], [255]]]


@given(grey_images)
def test_grey_survives_rgb(image):
    rgb = with_channels(image, 3)
    assert rgb.shape == (*image.shape[:2], 3)
    np.testing.assert_array_equal(with_channels(rgb, 1), image)
    np.testing.assert_array_equal(with_channels(image, 1), image)
