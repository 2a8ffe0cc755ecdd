"""The sections of what came out: evaluations as tables, everything measured as curves."""

from collections.abc import Callable, Sequence
from typing import Any

from contrastive_jax.figures import curves
from contrastive_jax.report import Run, charts, tables
from contrastive_jax.report.markup import Html, join, tag
from contrastive_jax.workdir import records


def evaluations(runs: Sequence[Run]) -> Html | None:
    found = [records.evaluations(run.records) for run in runs]
    keys = list(dict.fromkeys(key for of_run in found for key in of_run))
    measures = {key: about for run in runs for key, about in run.measures.items()}
    titles = {key: measures[key] for key in keys if measures.get(key, ('', ''))[0]}
    others = [k for k in keys if k not in titles and _spread_of(k) not in titles]
    if not keys:
        return None
    parts = []
    if titles:
        said = 'On held-out records, in % unless another unit is given; frozen unless fine-tuned.'
        rows = [
            [records.row_title(*about), *_values(found, key, _printer(about[1]))]
            for key, about in titles.items()
        ]
        parts += [tag('p', said), _grouped(runs, rows)]
    if others:
        rows = [[_spoken(key), *_values(found, key, lambda x: f'{x:.4g}', False)] for key in others]
        table = _grouped(runs, rows)
        parts += [tag('h3', 'Other measures'), table] if titles else [table]
    return join(parts)


def _printer(unit: str) -> Callable[[float], str]:
    return lambda value: records.printed(value, unit)


def _spread_of(key: str) -> str:
    """The key that this one is the standard deviation of, or ''."""
    return key.removesuffix('_std') if key.endswith('_std') else ''


def _values(
    found: Sequence[dict[str, list[float | None]]],
    key: str,
    write: Callable[[float], str],
    best: bool = True,
) -> list[Html]:
    """The cells of a row: three a run, the largest of the trained ones in bold."""
    nothing: list[float | None] = [None] * len(records.COLUMNS)
    values = [of_run.get(key, nothing) for of_run in found]
    spreads = [of_run.get(f'{key}_std', nothing) for of_run in found]
    top = max((v[-1] for v in values if v[-1] is not None), default=None)
    cells = []
    for of_run, around in zip(values, spreads, strict=True):
        for i, (value, spread) in enumerate(zip(of_run, around, strict=True)):
            trained = i == len(records.COLUMNS) - 1
            classes = ['number', *['trained'] * trained, *['first'] * (i == 0)]
            shown: Any = '–' if value is None else write(value)
            if trained and best and value is not None and value == top:
                shown = tag('b', shown)
            if spread is not None:
                shown = join(shown, tag('small', f' ± {write(spread)}'))
            cells.append(tag('td', shown, class_=' '.join(classes)))
    return cells


def _grouped(runs: Sequence[Run], rows: Sequence[Sequence[Any]]) -> Html:
    """A table with records.COLUMNS for every run."""
    count = len(records.COLUMNS)
    names = [
        tag('th', name, class_='number first' if i == 0 else 'number')
        for _ in runs
        for i, name in enumerate(records.COLUMNS)
    ]
    table = tables.table(['', *names], rows, 'numbers')
    if len(runs) == 1:
        return table
    groups = [
        tag('th', tables.label(runs, i), colspan=count, class_='first group')
        for i in range(len(runs))
    ]
    return Html(table.replace('<thead>', '<thead>' + tag('tr', tag('th'), groups), 1))


def _spoken(key: str) -> str:
    evaluator, metric = key.split('/', 1)
    return f'{evaluator}, {metric.replace("_", " ")}'


# --- Curves --------------------------------------------------------------------------------------


def over_steps(runs: Sequence[Run]) -> Html | None:
    of_accuracies: dict[str, str] = {}
    for run in runs:
        for keys in curves.drawn(run.records, run.measures).values():
            of_accuracies |= {key: '' for key in keys}
    first = ['train/loss', 'train/learning_rate', *of_accuracies]
    every = dict.fromkeys(key for run in runs for record in run.records for key in record)
    rest = [
        key
        for key in every
        if key not in first and key.startswith(('train/', 'eval/')) and not _hidden(key)
    ]
    drawn = [c for key in first if (c := _chart(runs, key))]
    more = [c for key in rest if (c := _chart(runs, key))]
    if not drawn:
        return None
    parts = [tag('div', drawn, class_='charts')]
    if more:
        summary = tag('summary', f'{len(more)} more')
        parts.append(tag('details', summary, tag('div', more, class_='charts')))
    return join(parts)


def _hidden(key: str) -> bool:
    metric = key.split('/', 2)[-1]
    return metric.startswith(records.BASELINE) or metric.endswith('_std') or '/' in metric


def _chart(runs: Sequence[Run], key: str) -> Html | None:
    """A metric over the steps of all runs that have it; accuracies in per cent."""
    short = key.split('/', 1)[1]
    title, unit = next((run.measures[short] for run in runs if short in run.measures), ('', ''))
    scale = 100 if unit == '%' else 1
    lines, baseline = [], None
    for i, run in enumerate(runs):
        steps, values = curves.series(run.records, key, scale)
        if len(steps):
            name = run.name if len(runs) > 1 else 'now' if run.step < (run.steps or 0) else 'last'
            lines.append(charts.Line(name, tables.colour(i), steps, values))
        if title and not baseline:
            evaluator, metric = short.split('/', 1)
            first = f'eval/{evaluator}/{records.BASELINE}{metric}'
            _, values = curves.series(run.records, first, scale)
            baseline = ('baseline', float(values[-1])) if len(values) else None
    # A value that was measured once has no curve.
    if not lines or max(len(line.steps) for line in lines) < 2:
        return None
    said = f'{title} ({unit})' if unit else title
    name = said or short.replace('/', ', ').replace('_', ' ')
    return charts.chart(name, lines, baseline)
