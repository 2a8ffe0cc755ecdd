"""Decoding and crops against Pillow and torchvision's formulas."""

import contextlib
import io
import math
import struct
import tracemalloc
import warnings

import numpy as np
import pytest
from pictures import encoded, photo, png_header
from PIL import Image

from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord
from contrastive_jax.data.decode import decode
from contrastive_jax.inputs import geometry


def test_decode_equals_pillow_on_what_is_lossless():
    image = photo()
    np.testing.assert_array_equal(decode(encoded(image, 'PNG')), image)
    np.testing.assert_array_equal(decode(encoded(image, 'WEBP', lossless=True)), image)
    grey = encoded(image, 'PNG', 'L')
    np.testing.assert_array_equal(
        decode(grey), np.asarray(Image.fromarray(image).convert('L').convert('RGB'))
    )
    palette = encoded(image, 'PNG', 'P')
    expected = np.asarray(Image.open(io.BytesIO(palette)).convert('RGB'))
    np.testing.assert_array_equal(decode(palette), expected)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('progressive', [False, True])
def test_decode_jpeg_is_pillows_within_two_levels(mode, progressive):
    content = encoded(photo(), 'JPEG', mode, progressive=progressive)
    got = decode(content)
    assert (got.shape, got.dtype) == ((50, 60, 3), np.uint8)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB')).astype(int)
    assert np.abs(got - expected).max() <= 2


def test_decode_puts_transparency_on_white_and_keeps_the_upper_half_of_16_bits():
    rgba = np.dstack([photo(), np.tile(np.linspace(0, 255, 60).astype(np.uint8), (50, 1))])
    got = decode(encoded(rgba, 'PNG', 'RGBA'))
    alpha = rgba[..., 3:] / 255.0
    assert np.abs(got - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (got[:, 0] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), 'L').convert('P')
    palette.putpalette([9, 8, 7, 6, 5, 4])
    file = io.BytesIO()
    palette.save(file, 'PNG', transparency=0)
    np.testing.assert_array_equal(decode(file.getvalue()), [[[255] * 3, [6, 5, 4]]])
    deep = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000
    file = io.BytesIO()
    Image.fromarray(deep).save(file, 'PNG')
    np.testing.assert_array_equal(decode(file.getvalue())[..., 1], deep >> 8)


def test_decode_ignores_exif_orientation():
    picture, file = Image.fromarray(photo()), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    picture.save(file, 'JPEG', exif=exif)
    assert decode(file.getvalue()).shape == (50, 60, 3)


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        ('JPEG', {}),
        ('JPEG', {'progressive': True}),
        ('JPEG', {'mode': 'CMYK'}),
        ('PNG', {}),
        ('WEBP', {}),
        ('WEBP', {'lossless': True}),
    ],
)
def test_decode_refuses_every_truncation(kind, options):
    content = encoded(photo(), kind, **options)
    for length in range(len(content)):
        # A PNG's last bytes are two checksums and the end mark: all pixels are there without them.
        if kind == 'PNG' and length > len(content) - 24:
            with contextlib.suppress(BadRecord):
                np.testing.assert_array_equal(decode(content[:length]), photo())
        else:
            with pytest.raises(BadRecord):
                decode(content[:length])


def test_decode_refuses_large_images_before_it_allocates_them():
    bombs = {
        'png': png_header(60_000, 60_000),
        'webp': b'RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0' + bytes(4) + b'\xff\x3f\0\xff\x3f\0' + bytes(8),
        'jpeg': encoded(photo(), 'JPEG').replace(
            struct.pack('>HH', 50, 60), struct.pack('>HH', 60_000, 60_000), 1
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for content in bombs.values():
            tracemalloc.start()
            with pytest.raises(BadRecord, match=r'\d+ x \d+ pixels are more than the limit'):
                decode(content)
            assert tracemalloc.get_traced_memory()[1] < 2**20
            tracemalloc.stop()
        # Above Pillow's own warning limit, where the caller allows it, there is no warning either.
        with pytest.raises(BadRecord, match='truncated'):
            decode(png_header(10_000, 9_000), max_pixels=10**9)
    with pytest.raises(BadRecord, match='60 x 50 pixels are more than the limit of 2999'):
        decode(encoded(photo(), 'JPEG'), max_pixels=2999)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'zero bytes'),
        (b'hello, this is text', r"not a JPEG, PNG or WebP image \(starts with b'hello, t'\)"),
        (b'GIF89a' + bytes(50), 'not a JPEG'),
        (b'RIFF\x10\0\0\0WEBPjunk' + bytes(20), 'unknown WebP chunk'),
        (b'\x89PNG\r\n\x1a\n' + b'junk' * 9, 'damaged'),
        (b'\xff\xd8\xff\xe0' + b'junk' * 9, 'damaged'),
    ],
)
def test_decode_names_what_it_refuses(content, reason):
    with pytest.raises(BadRecord, match=reason):
        decode(content)


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('flip', [0.0, 1.0])
def test_random_resized_crop_is_pillows_crop_and_resize(interpolation, flip):
    image = photo(height=70, width=90)
    resample = getattr(Image.Resampling, interpolation.upper())
    for seed in range(20):
        got = geometry.random_resized_crop(
            image, np.random.default_rng(seed), 32, interpolation=interpolation, flip=flip
        )
        box = geometry.crop_box(np.random.default_rng(seed), 70, 90)
        expected = np.asarray(Image.fromarray(image).crop(box).resize((32, 32), resample))
        np.testing.assert_array_equal(got, expected[:, ::-1] if flip else expected)


def test_crop_boxes_keep_to_their_limits_and_are_uniform():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [geometry.crop_box(rng, 400, 600, (0.1, 0.5), (0.8, 1.25)) for _ in range(4000)]
    )
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 600
    assert bottom.max() <= 400
    width, height = right - left, bottom - top
    area, ratio = width * height / (400 * 600), width / height
    # Nearly every first try fits here, so the draws are the uniform ones, up to whole pixels.
    assert 0.098 < area.min() < 0.103
    assert 0.49 < area.max() < 0.502
    assert abs(area.mean() - 0.3) < 0.005
    assert abs(np.log(ratio).mean()) < 0.01
    assert abs(np.log(ratio).std() - 2 * math.log(1.25) / math.sqrt(12)) < 0.005
    place = left / np.maximum(600 - width, 1)
    assert abs(place.mean() - 0.5) < 0.02
    assert place.max() == 1


def test_crop_follows_torchvisions_fallback():
    """A strip that no try fits: the largest centred box within the ratio, as get_params."""
    rng = np.random.default_rng(0)
    assert geometry.crop_box(rng, 10, 1000, (0.9, 1.0)) == (493, 0, 506, 10)
    assert geometry.crop_box(rng, 1000, 12, (0.9, 1.0)) == (0, 492, 12, 508)
    assert geometry.crop_box(rng, 30, 30, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 30, 30)
    for size in ((1, 1), (1, 7), (2, 1)):
        geometry.random_resized_crop(photo()[: size[0], : size[1]], rng, 8)


def test_center_crop_is_resize_and_centre_crop():
    image = photo(height=200, width=300)
    got = geometry.center_crop_resize(image, 56, 0.875).astype(int)
    resized = Image.fromarray(image).resize((96, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((20, 4, 76, 60))).astype(int)
    assert np.abs(got - expected).max() <= 1
    small = photo(height=32, width=32)
    assert geometry.center_crop_resize(small, 32) is small
    plain = np.asarray(Image.fromarray(image).crop((50, 0, 250, 200)).resize((50, 50), 3))
    assert (
        np.abs(geometry.center_crop_resize(image, 50)[:, 3:-3].astype(int) - plain[:, 3:-3]).max()
        <= 1
    )


def test_a_padded_crop_is_a_window_at_a_uniform_place():
    image, pad, size = photo(height=12, width=12), 2, 12
    around = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    windows = {
        around[i : i + size, j : j + size].tobytes(): (i, j)
        for i, j in np.ndindex(2 * pad + 1, 2 * pad + 1)
    }
    counts = np.zeros((5, 5), int)
    rng = np.random.default_rng(0)
    for _ in range(2500):
        got = geometry.random_resized_crop(image, rng, size, flip=0.0, pad=pad)
        counts[windows[got.tobytes()]] += 1
    assert abs(counts - 100).max() < 40  # four standard deviations
    whole = photo(height=20, width=30)
    got = geometry.random_resized_crop(whole, np.random.default_rng(1), size, flip=1.0, pad=pad)
    square = geometry.center_crop_resize(whole, size)
    around = np.pad(square, ((pad, pad), (pad, pad), (0, 0)))
    assert any(
        np.array_equal(got[:, ::-1], around[i : i + size, j : j + size])
        for i, j in np.ndindex(5, 5)
    )


def test_crop_options_are_checked():
    assert geometry.crop_options({'scale': [0.2, 1.0]}) == {'scale': (0.2, 1.0)}
    with pytest.raises(UserError, match=r"unknown key 'scales'. Did you mean 'scale'"):
        geometry.crop_options({'scales': (0.1, 1.0)})
    with pytest.raises(UserError, match=r"unknown interpolation 'cubic'. Did you mean 'bicubic'"):
        geometry.crop_options({'interpolation': 'cubic'})
    with pytest.raises(
        UserError, match=r'crop.scale: got \(0.5, 2\); expected 0 < low <= high <= 1'
    ):
        geometry.crop_options({'scale': (0.5, 2)})
    with pytest.raises(UserError, match='flip'):
        geometry.crop_options({'flip': 1.5})
    with pytest.raises(UserError, match=r'pad: got -4; expected a whole number of at least 0'):
        geometry.crop_options({'pad': -4})
