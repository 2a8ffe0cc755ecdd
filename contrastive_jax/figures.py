"""Pictures of a run: augmented views, training curves, and what a search has found. PNG files.

Matplotlib is imported when a figure is drawn, and without pyplot: no global state, no display.

B: images, V: views, L: local views, H W C.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

INK, GREY, FAINT = '#1f2933', '#8a94a0', '#e4e8ec'
COLOURS = ('#2563a8', '#d1662f', '#3c8d5a', '#8a4fa3', '#b08a1e', '#c2417c')
SIDE = 112  # pixels of a view in the grid, about


def views_grid(
    views_BVHWC: np.ndarray,
    path: Any,
    names: Sequence[str] | None = None,
    count: int = 16,
    local_BLHWC: np.ndarray | None = None,
) -> None:
    """Draws the views of some images, those of one image side by side.

    Args:
        views_BVHWC: float in [0, 1] (clipped to it) or uint8; 1 or 3 channels.
        path: of the PNG file.
        names: written under the images, one an image.
        count: how many images at most.
        local_BLHWC: drawn in rows to the right of the image's views, a pixel as large as theirs.
    """
    views = _uint8(views_BVHWC[:count])
    local = views[:, :0] if local_BLHWC is None else _uint8(local_BLHWC[:count])
    (B, V, H, W, _), (_, L, h, w, _) = views.shape, local.shape
    # Small images are enlarged by whole pixels, large ones shrunk.
    scale = max(1, round(SIDE / max(H, W))) if max(H, W) <= 1.5 * SIDE else SIDE / max(H, W)
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
            _write(sheet, names[b], x, y + tall + 2, cell_w)
    buffer = io.BytesIO()
    sheet.save(buffer, 'PNG')
    write(buffer.getvalue(), path)


class Tile(NamedTuple):
    """A picture that was found: [H, W, 3] uint8 or None, and two lines to write below it."""

    image: np.ndarray | None
    label: str
    name: str


def contact_sheet(
    found: Sequence[tuple[str, np.ndarray | None, Sequence[Tile]]], path: Any, side: int = 128
) -> None:
    """Draws what was found for each query below it, ten in a row.

    Args:
        found: for every query its text, its picture if it is one, and the tiles, best first.
        path: of the PNG file; its directory is made.
        side: pixels of a tile.
    """
    title, label, name = _font(17), _font(11, '-Bold'), _font(11)
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
            _tile(sheet, image, margin, y, side)
            draw.rectangle(
                (margin - 3, y - 3, margin + side + 2, y + side + 2), None, COLOURS[0], 2
            )
            x = margin + side + gap
            _write(sheet, text, x, y + side // 2 - 11, margin + width - x, title)
            y += side + 12
        for k, tile in enumerate(tiles):
            x, down = margin + k % columns * (side + gap), y + k // columns * (side + caption)
            _tile(sheet, tile.image, x, down, side)
            _write(sheet, tile.label, x, down + side + 4, side, label)
            _write(sheet, tile.name, x, down + side + 19, side, name, GREY)
        y += math.ceil(len(tiles) / columns) * (side + caption) + below
    buffer = io.BytesIO()
    sheet.save(buffer, 'PNG')
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(buffer.getvalue(), path)


def _tile(sheet: Image.Image, image: np.ndarray | None, x: int, y: int, side: int) -> None:
    """A whole picture in the middle of a square; a small one enlarged by whole pixels."""
    ImageDraw.Draw(sheet).rectangle((x, y, x + side - 1, y + side - 1), FAINT)
    if image is None:
        _write(sheet, 'cannot be read', x + 8, y + side // 2 - 7, side, _font(11), GREY)
        return
    picture = Image.fromarray(image)
    scale = side / max(picture.size)
    scale, resample = (
        (int(scale), Image.Resampling.NEAREST) if scale >= 2 else (scale, Image.Resampling.LANCZOS)
    )
    w, h = (max(1, round(n * scale)) for n in picture.size)
    sheet.paste(picture.resize((w, h), resample), (x + (side - w) // 2, y + (side - h) // 2))


def _font(size: int, style: str = '') -> Any:
    """Matplotlib's own, which has more alphabets than Pillow's."""
    import matplotlib

    return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{style}.ttf', size)


def _uint8(views: np.ndarray) -> np.ndarray:
    """Pixels of any kind as three channels of uint8."""
    views = np.asarray(views)
    if views.dtype != np.uint8:
        views = (np.nan_to_num(views.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    return np.repeat(views, 3, -1) if views.shape[-1] == 1 else views


def _columns(B: int, V: float) -> int:
    """How many images side by side: near a square picture, and with a full last row if possible."""
    ideal = math.sqrt(B / V) * 1.2
    return min(range(1, B + 1), key=lambda c: (abs(c - ideal) + 0.6 * (-B % c), -c))


def _write(
    sheet: Image.Image, text: str, x: int, y: int, width: int, font: Any = None, ink: str = INK
) -> None:
    """One line, cut to the width."""
    font = font or ImageFont.load_default(11)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + '…'
    ImageDraw.Draw(sheet).text((x, y), text, ink, font)


def training_curves(records: Sequence[Mapping[str, Any]], path: Any) -> None:
    """Draws loss, learning rate and every accuracy over the steps.

    Accuracies (`eval/<evaluator>/top1…`) are compared with the raw pixels' (`pixels_top1…`) and
    with the untrained encoder's, those of step 0, which are drawn as dashed and dotted lines.

    Args:
        records: as `metrics.read` gives them.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    accuracies = _accuracies(records)
    # Loss and learning rate on the left, and to their right a row for each evaluator.
    shape = (
        (max(2, len(accuracies)), 1 + max(map(len, accuracies.values()))) if accuracies else (1, 2)
    )
    figure = Figure(figsize=(4.3 * shape[1], 3.1 * shape[0]), dpi=120, layout='constrained')
    axes = figure.subplots(*shape, squeeze=False)
    last = max((r['step'] for r in records), default=0)
    for axis in axes.flat:
        axis.set_visible(False)
        axis.set_xlim(0, max(last, 1))
        axis.set_xlabel('step', color=GREY, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter(lambda value, _: f'{value:.4g}')
        axis.grid(color=FAINT, lw=0.8)
        axis.tick_params(colors=GREY, length=0, labelsize=9)
        for side in ('top', 'right', 'left'):
            axis.spines[side].set_visible(False)
        axis.spines['bottom'].set_color(GREY)
    _plain(axes.flat[0], records, 'train/loss', 'loss')
    rate = axes[1, 0] if accuracies else axes[0, 1]
    _plain(rate, records, 'train/learning_rate', 'learning rate')
    rate.set_ylim(bottom=0)
    for row, keys in enumerate(accuracies.values()):
        for column, key in enumerate(keys, 1):
            _accuracy(axes[row, column], records, key, COLOURS[1 + row % (len(COLOURS) - 1)])
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    write(buffer.getvalue(), path)


def _accuracies(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """evaluator -> keys of its accuracies of the encoder."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(k for r in records for k in r if k.startswith('eval/')):
        _, evaluator, metric = key.split('/', 2)
        # Without those of single classes, 'top1/<class>'.
        if metric.startswith('top1') and '/' not in metric and not metric.endswith('_std'):
            found.setdefault(evaluator, []).append(key)
    return found


def _plain(axis: Any, records: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    steps, values = _series(records, key)
    _title(axis, title)
    # A lone value has no line to be seen by.
    axis.plot(steps, values, '-' if len(steps) > 1 else 'o', color=COLOURS[0], lw=1.6)


def _accuracy(axis: Any, records: Sequence[Mapping[str, Any]], key: str, colour: str) -> None:
    """One accuracy over the steps, with raw pixels and the untrained encoder to compare with."""
    _, evaluator, metric = key.split('/')
    steps, values = _series(records, key, 100)
    spread_steps, spread = _series(records, f'{key}_std', 100)
    _, pixels = _series(records, f'eval/{evaluator}/pixels_{metric}', 100)
    name = metric.removeprefix('top1').strip('_').replace('_per_class', ' labels per class')
    name = name.replace('_percent', ' % of labels')
    _title(axis, f'{evaluator}, {name or "all labels"} (%)')
    if len(spread) and np.array_equal(steps, spread_steps):
        axis.fill_between(steps, values - spread, values + spread, color=colour, alpha=0.15, lw=0)
    axis.plot(steps, values, 'o-', color=colour, lw=1.8, ms=4, clip_on=False)
    if len(pixels):
        axis.axhline(pixels[-1], color=INK, ls='--', lw=1.1, label=f'raw pixels {pixels[-1]:.1f}')
    if len(values) and steps[0] == 0:
        axis.axhline(values[0], color=GREY, ls='--', lw=1.1, label=f'untrained {values[0]:.1f}')
    if len(values):
        axis.get_lines()[0].set_label(f'trained {values[-1]:.1f}')
        axis.margins(y=0.12)
        axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc='best')


def _title(axis: Any, text: str) -> None:
    axis.set_visible(True)
    axis.set_title(text, loc='left', fontsize=10.5, color=INK)


def _series(
    records: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric where it is finite; of two values for one step the later."""
    found = {r['step']: scale * r[key] for r in records if r.get(key) is not None}
    steps = sorted(found)
    return np.array(steps), np.array([found[s] for s in steps])


def write(png: bytes, path: Any) -> None:
    """Writes a file and its folder; whoever looks sees the old picture or the new one, whole."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_bytes(png)
    temporary.replace(path)
