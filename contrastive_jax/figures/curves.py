"""Curves of a run over its steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contrastive_jax.figures.style import COLOURS, FAINT, GREY, INK, png


def training_curves(
    records: Sequence[Mapping[str, Any]], measures: Mapping[str, tuple[str, str]]
) -> bytes:
    """Draws loss, learning rate and every measure with a title over the steps.

    Measures are compared with the baseline's and with the untrained encoder's, those of step 0,
    which are drawn as dashed lines.

    Args:
        records: as `workdir.records.read` gives them.
        measures: as `workdir.records.described` gives them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = drawn(records, measures)
    # Loss and learning rate on the left, and to their right a row for each evaluator.
    shape = (max(2, len(found)), 1 + max(map(len, found.values()))) if found else (1, 2)
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
    rate = axes[1, 0] if found else axes[0, 1]
    _plain(rate, records, 'train/learning_rate', 'learning rate')
    rate.set_ylim(bottom=0)
    for row, keys in enumerate(found.values()):
        for column, key in enumerate(keys, 1):
            about = measures[key.removeprefix('eval/')]
            _measure(axes[row, column], records, key, *about, COLOURS[1 + row % (len(COLOURS) - 1)])
    return png(figure)


def drawn(
    records: Sequence[Mapping[str, Any]], measures: Mapping[str, tuple[str, str]]
) -> dict[str, list[str]]:
    """evaluator -> keys of the measures of the encoder that have a title."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(k for r in records for k in r if k.startswith('eval/')):
        evaluator = key.split('/')[1]
        if measures.get(key.removeprefix('eval/'), ('', ''))[0]:
            found.setdefault(evaluator, []).append(key)
    return found


def _plain(axis: Any, records: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    steps, values = series(records, key)
    _title(axis, title)
    # A lone value has no line to be seen by.
    axis.plot(steps, values, '-' if len(steps) > 1 else 'o', color=COLOURS[0], lw=1.6)


def _measure(
    axis: Any,
    records: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    unit: str,
    colour: str,
) -> None:
    """One measure over the steps, with the baseline and the untrained encoder to compare with."""
    path, _, metric = key.rpartition('/')
    scale = 100 if unit == '%' else 1
    steps, values = series(records, key, scale)
    spread_steps, spread = series(records, f'{key}_std', scale)
    _, baseline = series(records, f'{path}/baseline_{metric}', scale)
    _title(axis, f'{title} ({unit})' if unit else title)
    if len(spread) and np.array_equal(steps, spread_steps):
        axis.fill_between(steps, values - spread, values + spread, color=colour, alpha=0.15, lw=0)
    axis.plot(steps, values, 'o-', color=colour, lw=1.8, ms=4, clip_on=False)
    if len(baseline):
        label = f'baseline {baseline[-1]:.1f}'
        axis.axhline(baseline[-1], color=INK, ls='--', lw=1.1, label=label)
    if len(values) and steps[0] == 0:
        axis.axhline(values[0], color=GREY, ls='--', lw=1.1, label=f'untrained {values[0]:.1f}')
    if len(values):
        axis.get_lines()[0].set_label(f'trained {values[-1]:.1f}')
        axis.margins(y=0.12)
        axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc='best')


def _title(axis: Any, text: str) -> None:
    axis.set_visible(True)
    axis.set_title(text, loc='left', fontsize=10.5, color=INK)


def series(
    records: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric where it is finite; of two values for one step the later."""
    found = {r['step']: scale * r[key] for r in records if r.get(key) is not None}
    steps = sorted(found)
    return np.array(steps), np.array([found[s] for s in steps])
