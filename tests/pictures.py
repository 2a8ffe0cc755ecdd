"""Pictures and folders of pictures for the tests of the data."""

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image


def photo(seed=0, height=50, width=60):
    """[H, W, 3] uint8: smooth noise, so that JPEG is close to it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind, mode='RGB', **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png_header(width, height):
    """A valid PNG of that size by its header, with next to no pixels in it."""

    def chunk(kind, body):
        return (
            struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
        )

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')
    )


def write(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make_folder(root, classes=('cat', 'dog'), count=6, splits=('train', 'test')):
    for split in splits:
        for name in classes:
            for i in range(count):
                write(root / split / name / f'{i}.png', encoded(photo(i, 20, 24), 'PNG'))
    return root
