"""Colours, type and files of all pictures of a run."""

import io
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

INK, GREY, FAINT = '#1f2933', '#8a94a0', '#e4e8ec'
COLOURS = ('#2563a8', '#d1662f', '#3c8d5a', '#8a4fa3', '#b08a1e', '#c2417c')


def font(size: int, style: str = '') -> Any:
    """Matplotlib's own, which has more alphabets than Pillow's."""
    import matplotlib

    return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{style}.ttf', size)


def text_line(
    sheet: Image.Image, text: str, x: int, y: int, width: int, font: Any = None, ink: str = INK
) -> None:
    """One line, cut to the width."""
    font = font or ImageFont.load_default(11)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + '…'
    ImageDraw.Draw(sheet).text((x, y), text, ink, font)


def uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any kind as three channels of uint8."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float32)).clip(0, 1)
        pixels = (pixels * 255).round().astype(np.uint8)
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def png(picture: Any) -> bytes:
    """A Pillow image or a Matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, 'PNG')
    else:
        # Without its version in the file, one picture is one sequence of bytes.
        picture.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


def write(content: bytes, path: Any) -> None:
    """Writes a file and its folder; whoever looks sees the old file or the new one, whole."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_bytes(content)
    temporary.replace(path)
