"""Line charts as inline SVG."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from contrastive_jax.report.markup import Html, join, tag

WIDTH, HEIGHT = 380, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
POINTS = 400  # of a line at most


class Line(NamedTuple):
    """One run's values over its steps, both [n]; what cannot be drawn has been left out."""

    name: str
    colour: str
    steps: np.ndarray
    values: np.ndarray


def chart(title: str, lines: Sequence[Line], baseline: tuple[str, float] | None = None) -> Html:
    """A figure of lines over steps, with their last values below it.

    Args:
        title: above it.
        lines: at least one, each with at least one point.
        baseline: what to compare with, a dashed horizontal line, and its name.
    """
    from matplotlib.ticker import MaxNLocator

    nice: list[float] = [1, 2, 2.5, 5, 10]
    values = np.concatenate([line.values for line in lines])
    values = np.append(values, baseline[1]) if baseline else values
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room * (low != 0), high + room
    last = max(1, *(int(line.steps[-1]) for line in lines))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts: list[Html] = []
    for tick in MaxNLocator(5, steps=nice).tick_values(low, high):
        if low <= tick <= high:
            at = f'{y(tick):.1f}'
            parts.append(tag('line', x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_='grid'))
            label = f'{0.0 if abs(tick) < 1e-12 else tick:.4g}'
            parts.append(tag('text', label, x=LEFT - 6, y=at, dy='.32em', text_anchor='end'))
    for tick in MaxNLocator(5, steps=[1, 2, 5, 10], integer=True).tick_values(0, last):
        if 0 <= tick <= last:
            anchor = 'end' if tick > 0.93 * last else 'middle'
            text = f'{int(tick):,}'
            parts.append(tag('text', text, x=f'{x(tick):.1f}', y=HEIGHT - 7, text_anchor=anchor))
    if baseline:
        at = f'{y(baseline[1]):.1f}'
        parts.append(tag('line', x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_='baseline'))
    for line in lines:
        parts += _drawn(line, x, y)
    svg = tag(
        'svg', *parts, viewBox=f'0 0 {WIDTH} {HEIGHT}', role='img', aria_label=f'{title} over steps'
    )
    keys = [_key(line.name, line.colour, line.values[-1]) for line in lines]
    if baseline:
        keys.append(_key(baseline[0], None, baseline[1]))
    return tag(
        'figure', tag('figcaption', title), svg, tag('ul', *keys, class_='keys'), class_='chart'
    )


def _drawn(line: Line, x: Any, y: Any) -> list[Html]:
    count = len(line.steps)
    # The first and the last are always among them.
    some = np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))
    points = [(x(line.steps[i]), y(line.values[i])) for i in some]
    path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in points)
    drawn = [tag('polyline', points=path, stroke=line.colour, class_='line')]
    if len(points) <= 12:
        dots = [
            tag('circle', cx=f'{a:.1f}', cy=f'{b:.1f}', r=3, fill=line.colour) for a, b in points
        ]
        drawn.append(join(dots))
    return drawn


def _key(name: str, colour: str | None, value: float) -> Html:
    style = f'background:{colour}' if colour else None
    swatch = tag('i', class_='swatch' if colour else 'swatch dashed', style=style)
    return tag('li', swatch, f' {name} ', tag('b', f'{value:.4g}'))
