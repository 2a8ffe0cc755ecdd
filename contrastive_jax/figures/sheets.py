"""Sheets of images side by side: augmented views, what a search has found, heat maps.

B: images, V: views, L: local views, H W C.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from contrastive_jax.figures.style import COLOURS, FAINT, GREY, INK, font, png, text_line, uint8

SIDE = 112  # pixels of a view in the grid, about


def views_grid(
    views_BVHWC: np.ndarray,
    names: Sequence[str] | None = None,
    count: int = 16,
    local_BLHWC: np.ndarray | None = None,
) -> bytes:
    """Draws the views of some images, those of one image side by side.

    Args:
        views_BVHWC: float in [0, 1] (clipped to it) or uint8; 1 or 3 channels.
        names: written under the images, one an image.
        count: how many images at most.
        local_BLHWC: drawn in rows to the right of the image's views, a pixel as large as theirs.
    """
    views = uint8(views_BVHWC[:count])
    local = views[:, :0] if local_BLHWC is None else uint8(local_BLHWC[:count])
    (B, V, H, W, _), (_, L, h, w, _) = views.shape, local.shape
    scale = _scale(H, W)
    width, height, small_w, small_h = (max(1, round(n * scale)) for n in (W, H, w, h))
    gap, margin, caption = 4, 18, 16 if names is not None else 0
    # As many rows of local views as are about as high as a view.
    deep = max(1, min(L, round(height / small_h)))
    across = math.ceil(L / deep)
    columns = _columns(B, V + across * small_w / width)
    rows = math.ceil(B / columns)
    tall = max(height, deep * (small_h + gap) - gap) if L else height
    cell_w, cell_h = V * (width + gap) + across * (small_w + gap) - gap, tall + caption
    sheet = Image.new(
        'RGB',
        (columns * (cell_w + margin) + margin, rows * (cell_h + margin) + margin),
        'white',
    )
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for b in range(B):
        x = margin + b % columns * (cell_w + margin)
        y = margin + b // columns * (cell_h + margin)
        for v in range(V):
            view = Image.fromarray(views[b, v]).resize((width, height), resample)
            sheet.paste(view, (x + v * (width + gap), y))
        for k in range(L):
            view = Image.fromarray(local[b, k]).resize((small_w, small_h), resample)
            right, down = k % across * (small_w + gap), k // across * (small_h + gap)
            sheet.paste(view, (x + V * (width + gap) + right, y + down))
        if names is not None:
            text_line(sheet, names[b], x, y + tall + 2, cell_w)
    return png(sheet)


class Tile(NamedTuple):
    """An image, [H, W, 3] uint8 or None, two lines to write below it, and a frame's colour."""

    image: np.ndarray | None
    label: str = ''
    name: str = ''
    frame: str = ''


def contact_sheet(
    found: Sequence[tuple[str, np.ndarray | None, Sequence[Tile]]], side: int = 128
) -> bytes:
    """Draws what was found for each query below it, ten in a row.

    Args:
        found: for every query its text, its image if it is one, and the tiles, best first.
        side: pixels of a tile.
    """
    title = font(17)
    margin, gap, caption, below = 28, 14, 40, 30
    most = max(len(tiles) for *_, tiles in found)
    columns = math.ceil(most / math.ceil(most / 10))
    width = max(columns, 4) * (side + gap) - gap
    letters = int(width / title.getlength('e'))
    heads = [textwrap.wrap(text, letters, max_lines=4, placeholder=' …') for text, *_ in found]
    heights = [
        (side if image is not None else 26 * len(head)) + 12
        + math.ceil(len(tiles) / columns) * (side + caption)
        for head, (_, image, tiles) in zip(heads, found, strict=True)
    ]  # fmt: skip
    height = sum(heights) + below * (len(found) - 1)
    sheet = Image.new('RGB', (width + 2 * margin, height + 2 * margin), 'white')
    draw = ImageDraw.Draw(sheet)
    y = margin
    for i, (head, (text, image, tiles)) in enumerate(zip(heads, found, strict=True)):
        if i:
            line = y - below // 2
            draw.line((margin, line, margin + width, line), FAINT)
        if image is None:
            draw.multiline_text((margin, y), '\n'.join(head), INK, title, spacing=6)
            y += 26 * len(head) + 12
        else:
            _tile(sheet, Tile(image, frame=COLOURS[0]), margin, y, side)
            x = margin + side + gap
            text_line(sheet, text, x, y + side // 2 - 11, margin + width - x, title)
            y += side + 12
        for k, tile in enumerate(tiles):
            x, down = margin + k % columns * (side + gap), y + k // columns * (side + caption)
            _tile(sheet, tile, x, down, side)
        y += math.ceil(len(tiles) / columns) * (side + caption) + below
    return png(sheet)


def _scale(height: int, width: int) -> float:
    """To a longer side of about SIDE: small images are enlarged by whole pixels."""
    longer = max(height, width)
    return max(1, round(SIDE / longer)) if longer <= 1.5 * SIDE else SIDE / longer


def tile_rows(rows: Sequence[Sequence[Tile]], headings: Sequence[str] = ()) -> bytes:
    """Draws rows of tiles, the first of each apart from the others.

    Args:
        rows: tiles whose images have one size; rows may differ in length.
        headings: of the columns.
    """
    height, width = next(t.image.shape[:2] for row in rows for t in row if t.image is not None)
    side = round(_scale(height, width) * max(height, width))
    margin, gap, apart = 22, 8, 16
    captions = any(tile.label or tile.name for row in rows for tile in row)
    pitch, top = side + (44 if captions else gap), margin + (22 if headings else 0)
    columns = max(map(len, rows))
    xs = [margin + k * (side + gap) + (apart if k else 0) for k in range(columns)]
    height = top + len(rows) * pitch + margin - (0 if captions else gap)
    sheet = Image.new('RGB', (xs[-1] + side + margin, height), 'white')
    for x, heading in zip(xs, headings, strict=bool(headings)):
        text_line(sheet, heading, x, margin - 4, side, font(12, '-Bold'))
    for r, row in enumerate(rows):
        for x, tile in zip(xs, row, strict=False):
            _tile(sheet, tile, x, top + r * pitch, side)
    return png(sheet)


def _tile(sheet: Image.Image, tile: Tile, x: int, y: int, side: int) -> None:
    """A whole image in the middle of a square; a small one enlarged by whole pixels."""
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x, y, x + side - 1, y + side - 1), FAINT)
    if tile.image is None:
        text_line(sheet, 'cannot be read', x + 8, y + side // 2 - 7, side, font(11), GREY)
    else:
        image = Image.fromarray(tile.image)
        scale, resample = side / max(image.size), Image.Resampling.LANCZOS
        if scale >= 2:
            scale, resample = int(scale), Image.Resampling.NEAREST
        w, h = (max(1, round(n * scale)) for n in image.size)
        sheet.paste(image.resize((w, h), resample), (x + (side - w) // 2, y + (side - h) // 2))
    if tile.frame:
        draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), None, tile.frame, 2)
    text_line(sheet, tile.label, x, y + side + 4, side, font(11, '-Bold'), tile.frame or INK)
    text_line(sheet, tile.name, x, y + side + 19, side, font(11), GREY)


def _columns(B: int, V: float) -> int:
    """Images side by side: for a sheet near a square, with a full last row if possible."""
    ideal = math.sqrt(B / V) * 1.2
    return min(range(1, B + 1), key=lambda c: (abs(c - ideal) + 0.6 * (-B % c), -c))
