"""Image files to uint8 RGB: strict, bounded in memory, safe to call from several threads.

The kind is told from the content, never from the file's name. The size is read from the header and
capped before anything is decoded. Every failure is a BadRecord with the reason.
"""

import io
import warnings
from typing import Any

import numpy as np

from contrastive_jax.data import BadRecord

# Pillow's own limit: 1 GiB of 3-byte pixels / 4.
MAX_PIXELS = 89_478_485

# Pillow warns of odd metadata (APNG, EXIF) that we do not read.
warnings.filterwarnings('ignore', module=r'PIL\.')


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file.

    Transparent pixels are composited on white, grey and palette images become RGB, 16-bit grey
    keeps its upper 8 bits, of an animation the first frame is taken. The EXIF orientation is not
    applied (as in torchvision's ImageFolder), nor are colour profiles.

    Args:
        data: the file's bytes.
        max_pixels: larger images (width × height in the header) are refused.

    Returns:
        [H, W, 3] uint8.

    Raises:
        BadRecord: empty, not one of the three kinds, too large, truncated or damaged.
    """
    if not data:
        raise BadRecord('zero bytes')
    try:
        if data[:3] == b'\xff\xd8\xff':
            return _jpeg(data, max_pixels)
        kind: Any
        if data[:8] == b'\x89PNG\r\n\x1a\n':
            from PIL.PngImagePlugin import PngImageFile

            kind = PngImageFile
        elif data[:4] == b'RIFF' and data[8:12] == b'WEBP':
            from PIL.WebPImagePlugin import WebPImageFile

            _cap(_webp_size(data), max_pixels)
            kind = WebPImageFile
        else:
            raise BadRecord(f'not a JPEG, PNG or WebP image (starts with {data[:8]!r})')
        return _pillow(kind, data, max_pixels)
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise BadRecord(f'damaged image: {error}') from error


def _cap(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadRecord(f'{size[0]} x {size[1]} pixels are more than the limit of {max_pixels}')


def _jpeg(data: bytes, max_pixels: int) -> np.ndarray:
    import simplejpeg

    header: Any = simplejpeg.decode_jpeg_header(data)
    height, width, colorspace, _ = header
    _cap((width, height), max_pixels)
    if colorspace in ('CMYK', 'YCCK'):
        from PIL.JpegImagePlugin import JpegImageFile

        return _pillow(JpegImageFile, data, max_pixels)
    # strict (the default): libjpeg's warnings, a missing end among them, are errors.
    return simplejpeg.decode_jpeg(data, 'RGB')


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas, read here because Pillow allocates it while opening."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise BadRecord('truncated WebP header')
    if chunk == b'VP8X':
        return 1 + int.from_bytes(body[4:7], 'little'), 1 + int.from_bytes(body[7:10], 'little')
    if chunk == b'VP8L':
        bits = int.from_bytes(body[1:5], 'little')
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b'VP8 ':
        size = int.from_bytes(body[6:8], 'little'), int.from_bytes(body[8:10], 'little')
        return size[0] & 0x3FFF, size[1] & 0x3FFF
    raise BadRecord(f'unknown WebP chunk {chunk!r}')


def _pillow(kind: Any, data: bytes, max_pixels: int) -> np.ndarray:
    # The file class itself, not Image.open: that one warns of large sizes before we can refuse.
    with kind(io.BytesIO(data)) as image:
        _cap(image.size, max_pixels)
        image.load()
        if image.mode.startswith('I'):
            grey = np.asarray(image).astype(np.int64) >> 8
            grey = np.clip(grey, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
            from PIL import Image

            rgba = image.convert('RGBA')
            white = Image.new('RGBA', rgba.size, (255, 255, 255, 255))
            return np.array(Image.alpha_composite(white, rgba).convert('RGB'))
        return np.array(image.convert('RGB'))
