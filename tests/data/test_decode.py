"""Encoded images to pixels, damage that is never silent, sizes, and work on all cores."""

import hashlib
import io
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cnn_jax.data import decode as module
from cnn_jax.data.decode import (
    CHUNK,
    FORMATS,
    CorruptImage,
    Finding,
    decode,
    examine,
    image_shape,
    load_findings,
    parallel_map,
    read_file,
    resize_image,
    scan,
    skipped,
    store_findings,
    with_channels,
)
from cnn_jax.errors import UserError
from cnn_jax.runtime import cores
from tests.damage import damaged
from tests.data.conftest import open_source

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


@given(grey_images | rgb_images, st.sampled_from(['PNG', 'BMP', 'TIFF']))
def test_lossless_formats_round_trip(image, kind):
    np.testing.assert_array_equal(decode(encoded(picture(image), kind, lossless=True)), image)


def filled(mode, pixels, palette=()):
    image = Image.new(mode, (len(pixels), 1))
    if palette:
        image.putpalette(palette)
    image.putdata(pixels)
    return image


PALETTE = (10, 20, 30, 200, 100, 0)
DEEP = np.array([[0x0000, 0x12FF, 0x8000, 0xFFFF]], np.uint16)
HIGHEST = [[0x00], [0x12], [0x80], [0xFF]]
DEEP_RGB = b'\0' + struct.pack('>6H', 0x0000, 0x12FF, 0xFFFF, 0x80FF, 0x00FF, 0x7F00)
DEEP_GREY = b'\0' + struct.pack('>2H', 0x1234, 0x1235)
KINDS = {
    'black and white': (encoded(filled('1', [0, 255]), 'PNG'), [[0], [255]]),
    'palette': (encoded(filled('P', [1, 0], PALETTE), 'PNG'), [[200, 100, 0], [10, 20, 30]]),
    'transparent': (
        encoded(filled('RGBA', [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)]), 'PNG'),
        [[10, 20, 30], [255] * 3, [127] * 3],
    ),
    'grey with alpha': (
        encoded(filled('LA', [(40, 255), (40, 0), (0, 128)]), 'PNG'),
        [[40], [255], [127]],
    ),
    'transparent palette entry': (
        encoded(filled('P', [0, 1], PALETTE), 'PNG', transparency=1),
        [[10, 20, 30], [255] * 3],
    ),
    'sixteen bits': (encoded(Image.fromarray(DEEP), 'PNG'), HIGHEST),
    'sixteen-bit RGB': (png(2, 1, 16, 2, DEEP_RGB), [[0, 0x12, 0xFF], [0x80, 0, 0x7F]]),
    'sixteen bits of a TIFF': (encoded(Image.fromarray(DEEP), 'TIFF'), HIGHEST),
    'palette of greys': (
        encoded(filled('P', [1, 0], (10, 10, 10, 200, 200, 200)), 'GIF'),
        [[200], [10]],
    ),
    'integers': (encoded(Image.fromarray(DEEP.astype('i4')), 'TIFF'), HIGHEST),
    'floats': (encoded(Image.fromarray(np.float32([[0, 0.5, 1]])), 'TIFF'), [[0], [128], [255]]),
    'CMYK of a TIFF': (encoded(filled('CMYK', [(0, 255, 255, 0)]), 'TIFF'), [[255, 0, 0]]),
    'black and white of a TIFF': (encoded(filled('1', [0, 255]), 'TIFF'), [[0], [255]]),
    'transparent grey of sixteen bits': (
        png(2, 1, 16, 0, DEEP_GREY, b'tRNS' + struct.pack('>H', 0x1234)),
        [[255], [0x12]],
    ),
}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_pixel_becomes_grey_or_rgb(kind):
    data, expected = KINDS[kind]
    assert decode(data).tolist() == [expected]
    assert examine(data) == (1, len(expected), len(expected[0]))


@pytest.mark.parametrize('values', [[-1, 5], [0, 65_536], [0.0, 1.1], [0.0, np.nan]], ids=str)
def test_pixels_of_an_unknown_range_are_refused(values):
    kind = np.int32 if type(values[0]) is int else np.float32
    with pytest.raises(CorruptImage, match=r'pixels from .* and not from 0 to'):
        decode(encoded(Image.fromarray(np.array([values], kind)), 'TIFF'))


INKS = ('CMYK', 'JPEG', (0, 255, 255, 0))  # magenta and yellow: red
LIGHTNESS = ('LAB', 'TIFF', (138, 209, 195))  # the same red


@pytest.mark.parametrize(('mode', 'kind', 'red'), [INKS, LIGHTNESS])
def test_inks_and_lightness_become_rgb(mode, kind, red):
    pixels = decode(encoded(Image.new(mode, (8, 8), red), kind, quality=100)).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels - [255, 0, 0]).max() <= 15


# Orientation and animation.


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


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
    for kind in ('PNG', 'TIFF'):
        data = encoded(picture(image), kind, exif=turned(orientation))
        np.testing.assert_array_equal(decode(data), ORIENTED[orientation](image))
        assert examine(data) == decode(data).shape


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG', 'TIFF', 'AVIF', 'MPO'])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [Image.new('RGB', (4, 4), colour) for colour in ('red', 'blue')]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 1
    assert examine(data) == (4, 4, 3)


# Damage.


PPM = encoded(Image.new('L', (2, 2)), 'PPM')


@pytest.mark.parametrize('data', [b'', b'text', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'BM', PPM])
def test_other_bytes_and_formats_are_corrupt(data):
    with pytest.raises(CorruptImage, match=r'.'):
        decode(data)


@pytest.mark.parametrize('kind', FORMATS)
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
        *(encoded(image, kind) for kind in ('BMP', 'TIFF', 'AVIF')),
        *(encoded(image, 'TIFF', compression=how) for how in ('tiff_lzw', 'jpeg')),
        encoded(image.convert('I;16'), 'TIFF'),
        encoded(image, 'JPEG', progressive=True),
        encoded(palette, 'GIF', save_all=True, append_images=[palette.rotate(90)]),
    ]


@pytest.mark.filterwarnings('ignore')  # Pillow's, of damage that it repairs
@settings(derandomize=True, max_examples=200)
@given(st.sampled_from(whole_images()).flatmap(damaged))
def test_examine_agrees_with_decode_on_damaged_bytes(data):
    try:
        expected = decode(data).shape
    except CorruptImage:
        with pytest.raises(CorruptImage):
            examine(data)
    else:
        assert examine(data) == expected


def test_large_images_are_read_up_to_bounds_of_ours(monkeypatch, random_image):
    """Bounds of a thousandth: a JPEG beyond the first is decoded at less, others whole."""
    monkeypatch.setattr(module, 'MAX_PIXELS', 1000)
    monkeypatch.setattr(module, 'MAX_WHOLE_PIXELS', 2000)
    monkeypatch.setattr(module, 'MAX_JPEG_PIXELS', 50_000)
    shapes = {(25, 40): (25, 40), (26, 40): (13, 20), (80, 51): (40, 26), (249, 200): (32, 25)}
    for large, expected in shapes.items():
        for options in ({}, {'progressive': True}, {'exif': turned(6)}):
            data = encoded(picture(random_image((*large, 3))), 'JPEG', **options)
            shape = (*(expected[::-1] if 'exif' in options else expected), 3)
            assert decode(data).shape == examine(data) == shape
    whole = random_image((40, 50, 3))
    np.testing.assert_array_equal(decode(encoded(picture(whole), 'PNG')), whole)
    for kind, size, bound in (('PNG', (51, 40), '2,000'), ('JPEG', (251, 200), '50,000')):
        data = encoded(picture(random_image((*size, 3))), kind)
        for read in (decode, examine):
            with pytest.raises(CorruptImage, match=f'{size[1]}×{size[0]} pixels .* {bound}'):
                read(data)


# Files.


def test_only_regular_files_of_a_possible_size_are_read(tmp_path):
    (tmp_path / 'image').write_bytes(b'content')
    (tmp_path / 'link').symlink_to('image')
    assert read_file(tmp_path / 'image') == read_file(tmp_path / 'link') == b'content'
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'device').symlink_to('/dev/zero')
    for path in (tmp_path / 'pipe', tmp_path / 'device', tmp_path):
        with pytest.raises(CorruptImage, match='regular'):
            read_file(path)
    (tmp_path / 'huge').touch()
    os.truncate(tmp_path / 'huge', 1 << 40)
    with pytest.raises(CorruptImage, match='1,099,511,627,776 bytes'):
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


# Sizes.


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 3]),
    st.sampled_from(['stretch', 'crop']),
    st.integers(1, 20),
    st.sampled_from([0, 1, 3]),
)
def test_prepare_gives_the_promised_shape(height, width, channels, resize, size, wanted):
    image = np.zeros((height, width, channels), np.uint8)
    assert resize_image(image, resize, size, wanted).shape == (size, size, wanted or channels)
    assert resize_image(image, 'none', 0, wanted).shape == (height, width, wanted or channels)


def test_crop_takes_the_centre_square():
    image = np.zeros((4, 10, 1), np.uint8)
    image[:, 3:7] = 200
    assert (resize_image(image, 'crop', 4) == 200).all()
    assert (resize_image(image.transpose(1, 0, 2), 'crop', 4) == 200).all()


@pytest.mark.parametrize('axis', [0, 1])
def test_bilinear_reduction_by_two_has_its_textbook_weights(axis):
    impulse = np.zeros((8, 8, 1), np.uint8)
    impulse[3] = 128  # the triangle of support 2 gives 3/8 and 1/8 to its neighbours
    reduced = resize_image(np.swapaxes(impulse, 0, axis), 'stretch', 4)
    assert np.swapaxes(reduced, 0, axis)[:, 0, 0].tolist() == [0, 48, 16, 0]


def test_images_of_different_sizes_are_named(tmp_path, write_images):
    write_images(tmp_path, {'cat': 3}, size=(8, 6))
    write_images(tmp_path, {'dog': 3}, size=(9, 7))
    source = open_source(f'folder:{tmp_path}', split='all')
    with pytest.raises(UserError) as caught:
        image_shape(source)
    for part in ('cat/0.png is 6×8', 'dog/0.png is 7×9', 'config.data.resize', 'config.data.size'):
        assert part in str(caught.value)
    assert image_shape(source, 'stretch', 5) == (5, 5, 3)


# Examination.

GOOD = Finding(2, 2, 1, '', '')
BAD = Finding(0, 0, 0, 'cut off', '')


def test_the_finding_of_an_image():
    data = encoded(picture(np.zeros((3, 5, 3), np.uint8)), 'PNG')
    assert scan(data) == Finding(3, 5, 3, '', hashlib.sha256(data).hexdigest())
    damaged = scan(data[:45])
    assert damaged[:3] == (0, 0, 0)
    assert damaged.reason


def test_images_are_skipped_up_to_the_limit_itself():
    paths = [f'{i}.png' for i in range(100)]
    for percent in range(101):  # 0.29 · 100 is less than 29
        findings = [BAD] * percent + [GOOD] * (100 - percent)
        wrong = skipped('set', paths, findings, float(f'{percent}e-2'))
        assert wrong == tuple((path, 'unreadable: cut off') for path in paths[:percent])
    with pytest.raises(UserError, match=r'4 of the 100 .*0\.png: cut off.*max_corrupt'):
        skipped('set', paths, [BAD] * 4 + [GOOD] * 96, 0.03)
    assert skipped('set', [], [], 0.0) == ()


def test_findings_are_stored_until_they_are_damaged_or_the_rule_changes(cache_dir, monkeypatch):
    assert load_findings('key') == []
    store_findings('key', [(1, GOOD), (2, BAD)])
    assert [(k, Finding(*found)) for k, found in load_findings('key')] == [(1, GOOD), (2, BAD)]
    with monkeypatch.context() as patch:
        patch.setattr(module, 'RULE', module.RULE + 1)
        assert load_findings('key') == []
    (path,) = cache_dir.rglob('*.json')
    path.write_bytes(path.read_bytes()[:-3])
    assert load_findings('key') == []


# Work on all cores.


@given(st.integers(0, 5 * CHUNK))
def test_results_come_in_order(n):
    assert parallel_map(lambda i: i * i, n, '') == [i * i for i in range(n)]


def test_the_first_error_ends_the_work():
    done = []

    def work(i):
        if i == 3:
            raise KeyError('three')
        time.sleep(0.001)
        done.append(i)

    with pytest.raises(KeyError, match='three'):
        parallel_map(work, 100 * cores() * CHUNK, '')
    assert len(done) < 10 * cores() * CHUNK


def test_the_work_is_shared():
    both_here = threading.Barrier(min(2, cores()), timeout=10)
    parallel_map(lambda i: both_here.wait() if i % CHUNK == 0 else None, 2 * CHUNK, '')


def test_a_photograph_in_heic_says_what_reads_it(monkeypatch):
    monkeypatch.setattr(module, 'HAS_HEIF', False)
    with pytest.raises(CorruptImage, match='requirements-heic'):
        decode(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
