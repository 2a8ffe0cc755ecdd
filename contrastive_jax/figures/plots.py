"""Figures of features, of classes and of layers: points, a confusion matrix, values by depth.

N: points, C: classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contrastive_jax.figures.style import COLOURS, FAINT, GREY, INK, png

# Ten that are told apart, then the same ones again with another marker.
HUES = (*COLOURS, '#3aa6b9', '#7a5230', '#8fae3b', '#3b3f8f')
MARKERS = 'o^sD'
NAMED = 25  # classes whose confusion matrix has room for names and numbers
LETTERS = 22  # of a class's name


def scatter(x_N2: np.ndarray, label_N: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Draws points, coloured by class, with a legend beside them.

    Args:
        x_N2: where they are; axes have no scale.
        label_N: int from 0; −1 is drawn in grey.
        names: of the classes; those that have a point are in the legend, so there should be few.
        title: above the points.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    there = [int(c) for c in np.unique(label_N) if c >= 0]
    figure = Figure(figsize=(8.4 if there else 6.6, 6.8), dpi=120, layout='constrained')
    axis = figure.subplots()
    axis.set_title(title, loc='left', fontsize=10.5, color=INK)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_aspect('equal')
    # A square about all points.
    middle_2 = (x_N2.max(0) + x_N2.min(0)) / 2
    reach = 0.53 * float(np.ptp(x_N2, axis=0).max()) or 1.0
    axis.set_xlim(middle_2[0] - reach, middle_2[0] + reach)
    axis.set_ylim(middle_2[1] - reach, middle_2[1] + reach)
    for spine in axis.spines.values():
        spine.set_color(FAINT)
    size = float(np.clip(9000 / max(len(x_N2), 1), 6, 28))
    bare = label_N < 0
    axis.scatter(*x_N2[bare].T, s=size, c=GREY, lw=0, alpha=0.6)
    styles: list[dict[str, Any]] = [
        {'color': HUES[i % len(HUES)], 'marker': MARKERS[i // len(HUES) % len(MARKERS)]}
        for i in range(len(there))
    ]
    for c, style in zip(there, styles, strict=True):
        axis.scatter(*x_N2[label_N == c].T, s=size, lw=0, alpha=0.75, **style)
    if there:
        handles = [Line2D([], [], ls='', ms=7, **style) for style in styles]
        legend = figure.legend(
            handles,
            list(map(str, there)),
            loc='outside right upper',
            frameon=False,
            fontsize=10,
            labelcolor=INK,
            ncols=math.ceil(len(there) / 25),
        )
        # Only now, because a name may begin with '_', which legends leave out.
        for text, c in zip(legend.get_texts(), there, strict=True):
            text.set_parse_math(False)
            text.set_text(short(names[c]))
    return png(figure)


def confusion(counts_CC: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Draws how often each class is taken for which, and lists the most frequent mistakes.

    Args:
        counts_CC: int, images of the row's class that were put into the column's.
        names: of the classes.
        title: above the matrix.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    C = len(counts_CC)
    named = C <= NAMED
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    side = 2.2 + 0.4 * C if named else 7.5
    figure = Figure(figsize=(side + 3.2, side), dpi=120, layout='compressed')
    axis, beside = figure.subplots(1, 2, width_ratios=(side, 3.0))
    colours = LinearSegmentedColormap.from_list('counts', ['#ffffff', COLOURS[0]])
    # In large matrices mistakes are rare in each cell: the root lets them be seen.
    axis.imshow(share_CC if named else np.sqrt(share_CC), cmap=colours, vmin=0, vmax=1)
    axis.set_title(title, loc='left', fontsize=10.5, color=INK)
    axis.set_xlabel('classified as', color=GREY, fontsize=9)
    axis.set_ylabel('class', color=GREY, fontsize=9)
    axis.tick_params(colors=INK, length=0, labelsize=9)
    for spine in axis.spines.values():
        spine.set_color(FAINT)
    if named:
        ticks = [short(name) for name in names]
        turn: dict[str, Any] = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'}
        axis.set_xticks(
            range(C), ticks, parse_math=False, **(turn if max(map(len, ticks)) > 3 else {})
        )
        axis.set_yticks(range(C), ticks, parse_math=False)
        for i, j in zip(*np.nonzero(counts_CC), strict=True):
            ink = 'white' if share_CC[i, j] > 0.55 else INK
            axis.text(j, i, str(counts_CC[i, j]), ha='center', va='center', color=ink, fontsize=8)
    _mistakes(beside, counts_CC, names)
    return png(figure)


def depth(lines: Mapping[str, Sequence[float]], names: Sequence[str], title: str) -> bytes:
    """Draws a percentage of every layer, from the first to the last.

    Args:
        lines: of each encoder a percentage per name; without a name where there is but one.
        names: of the layers.
        title: above the lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6 if len(lines) == 1 else 8.4, 4.2), dpi=120, layout='constrained')
    axis = figure.subplots()
    axis.set_title(f'{title} (%)', loc='left', fontsize=10.5, color=INK)
    axis.set_xticks(range(len(names)), names)
    axis.grid(color=FAINT, lw=0.8, axis='y')
    axis.tick_params(colors=GREY, length=0, labelsize=9)
    for side in ('top', 'right', 'left'):
        axis.spines[side].set_visible(False)
    axis.spines['bottom'].set_color(GREY)
    for i, (name, values) in enumerate(lines.items()):
        colour, marker = HUES[i % len(HUES)], MARKERS[i // len(HUES) % len(MARKERS)]
        axis.plot(values, f'{marker}-', color=colour, lw=1.6, ms=5, label=name)
        if len(lines) == 1:
            for x, y in enumerate(values):
                axis.annotate(f'{y:.1f}', (x, y), (0, 6), textcoords='offset points', ha='center')
    axis.margins(y=0.14)
    if len(lines) > 1:
        figure.legend(frameon=False, fontsize=9, labelcolor=INK, loc='outside right upper')
    return png(figure)


def heat(x_HW: np.ndarray) -> np.ndarray:
    """Values from 0 as colours, uint8 [H, W, 3]; the largest is the brightest."""
    import matplotlib

    # Perceptually uniform, and dark where there is nothing.
    x_HW = x_HW / max(float(x_HW.max()), 1e-30)
    return matplotlib.colormaps['inferno'](x_HW, bytes=True)[..., :3]


def _mistakes(axis: Any, counts_CC: np.ndarray, names: Sequence[str], most: int = 15) -> None:
    """The pairs of classes that are confused most, as text."""
    axis.axis('off')
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    order = np.argsort(-wrong_CC, axis=None, kind='stable')[:most]
    pairs = [divmod(int(place), len(names)) for place in order]
    pairs = [(i, j) for i, j in pairs if wrong_CC[i, j]]

    def write(text: str, right: float, row: float, **style: Any) -> None:
        """Text at a place in points from the corner."""
        axis.annotate(
            text,
            (0, 1),
            xycoords='axes fraction',
            xytext=(right, -9 - 15 * row),
            textcoords='offset points',
            fontsize=9,
            parse_math=False,
            **style,
        )

    write('most frequent mistakes', 0, 0, color=GREY)
    if not pairs:
        write('none', 0, 1.4, color=INK)
    for row, (i, j) in enumerate(pairs):
        write(str(wrong_CC[i, j]), 22, row + 1.4, color=GREY, ha='right')
        write(f'{short(names[i])} → {short(names[j])}', 32, row + 1.4, color=INK)


def short(name: str) -> str:
    """A class's first name ('tench, Tinca tinca' has two), cut."""
    name = name.partition(',')[0] or name
    return name if len(name) <= LETTERS else f'{name[: LETTERS - 1]}…'
