"""The page: one HTML file with everything in it, no script, nothing from elsewhere."""

import base64
import json
import pathlib
import re
import shlex
import statistics
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from contrastive_jax import checkpoint, metrics
from contrastive_jax.figures import curves
from contrastive_jax.figures.style import COLOURS
from contrastive_jax.report import Run, charts
from contrastive_jax.report.markup import Html, join, tag

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LISTED = 40  # classes and bad records that are shown
_ABSENT = object()
BEFORE = {'pixels': 'raw pixels', 'step_0': 'untrained'}


def render(runs: Sequence[Run]) -> str:
    """The page about one run, or about several side by side."""
    sections = {
        'Results': _results(runs),
        'Curves': _curves(runs),
        'Pictures': _pictures(runs),
        'Configuration': _configuration(runs),
        'Data': _data(runs),
        'Environment': _environment(runs),
    }
    sections = {name: content for name, content in sections.items() if content}
    title = ' and '.join(run.name for run in runs)
    head = tag(
        'head',
        tag('meta', charset='utf-8'),
        tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
        tag('meta', http_equiv='Content-Security-Policy', content=POLICY),
        tag('title', title),
        tag('style', Html(pathlib.Path(__file__).with_name('page.css').read_text())),
    )
    links = [tag('a', name, href=f'#{name.lower()}') for name in sections]
    body = tag(
        'body',
        tag('header', tag('h1', title), _summary(runs), tag('nav', links)),
        tag(
            'main',
            (
                tag('section', tag('h2', name), content, id=name.lower())
                for name, content in sections.items()
            ),
        ),
    )
    return '<!DOCTYPE html>\n' + tag('html', head, body, lang='en') + '\n'


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _label(runs: Sequence[Run], i: int, more: str = '') -> Html:
    """What is of which run: its name and colour where there are several, and something more."""
    if len(runs) == 1:
        return join(more)
    swatch = tag('i', class_='swatch', style=f'background:{_colour(i)}')
    return join(swatch, ' ', ', '.join(filter(None, [runs[i].name, more])))


def _heads(runs: Sequence[Run]) -> list[Html]:
    """The head of a table with a column for every run; one run needs none."""
    return [Html(), *(_label(runs, i) for i in range(len(runs)))] if len(runs) > 1 else []


def _table(head: Sequence[Any], rows: Iterable[Iterable[Any]], class_: str = '') -> Html:
    """A table whose first column names the rows; cells that are <td> or <th> already stay."""

    def cell(content: Any, name: str) -> Html:
        ready = isinstance(content, Html) and content.startswith(('<td', '<th'))
        return Html(content) if ready else tag(name, content)

    body = [tag('tr', (cell(c, 'td' if i else 'th') for i, c in enumerate(row))) for row in rows]
    top = tag('thead', tag('tr', (cell(c, 'th') for c in head))) if head else None
    return tag('div', tag('table', top, tag('tbody', body), class_=class_ or None), class_='wide')


# --- Summary -------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> Html:
    facts: dict[str, Callable[[Run], Any]] = {
        'Method': lambda run: run.config.get('method.name'),
        'Encoder': _encoder,
        'Data': _source,
        'Steps': _steps,
        'Batch': lambda run: f'{run.config["batch_size"]:,} images',
        'Speed': _speed,
        'Devices': _devices,
    }
    if len(runs) > 1:
        rows = [[name, *(fact(run) or '–' for run in runs)] for name, fact in facts.items()]
        return _table(_heads(runs), rows, 'facts')
    found = {name: fact(runs[0]) for name, fact in facts.items()}
    pairs = [
        tag('div', tag('dt', name), tag('dd', value)) for name, value in found.items() if value
    ]
    return tag('dl', pairs)


def _encoder(run: Run) -> str:
    name = str(run.config.get('model.name', ''))
    if size := run.config.get('model.size'):
        name += f' {size}'
    return f'{name}, {run.parameters} parameters' if run.parameters else name


def _source(run: Run) -> str:
    splits = run.environment.get('data', {}).get('splits', {})
    counts = ', '.join(f'{count:,} {name}' for name, count in splits.items())
    return ': '.join(filter(None, [run.config['data.source'], counts]))


def _steps(run: Run) -> str:
    if run.steps is None or run.step >= run.steps:
        return f'{run.step:,}'
    return f'{run.step:,} of {run.steps:,}'


def _speed(run: Run) -> str:
    found = [r['train/images_per_second'] for r in run.records if r.get('train/images_per_second')]
    return f'{statistics.median(found):,.0f} images/s' if found else ''


def _devices(run: Run) -> str:
    starts = run.environment.get('starts', [])
    return ', '.join(f'{n} × {kind}' for kind, n in starts[-1]['devices'].items()) if starts else ''


# --- Results -------------------------------------------------------------------------------------


def _results(runs: Sequence[Run]) -> Html | None:
    found = [metrics.evaluations(run.records) for run in runs]
    keys = list(dict.fromkeys(key for of_run in found for key in of_run))
    titles = metrics.titles(keys)
    others = [k for k in keys if k not in titles and _spread_of(k) not in titles]
    if not keys:
        return None
    parts = []
    if titles:
        said = 'Accuracies and recalls (%) on held-out images; the encoder is frozen.'
        rows = [
            [title, *_values(found, key, lambda x: f'{100 * x:.1f}')]
            for key, title in titles.items()
        ]
        parts += [tag('p', said), _grouped(runs, rows)]
    if others:
        rows = [[_spoken(key), *_values(found, key, lambda x: f'{x:.4g}', False)] for key in others]
        table = _grouped(runs, rows)
        parts += [tag('h3', 'Other measures'), table] if titles else [table]
    return join(parts)


def _spread_of(key: str) -> str:
    """What this is the standard deviation of, if it is one."""
    return key.removesuffix('_std') if key.endswith('_std') else ''


def _values(
    found: Sequence[dict[str, list[float | None]]],
    key: str,
    write: Callable[[float], str],
    best: bool = True,
) -> list[Html]:
    """The cells of a row: three a run, the largest of the trained ones in bold."""
    nothing: list[float | None] = [None] * len(metrics.COLUMNS)
    values = [of_run.get(key, nothing) for of_run in found]
    spreads = [of_run.get(f'{key}_std', nothing) for of_run in found]
    top = max((v[-1] for v in values if v[-1] is not None), default=None)
    cells = []
    for of_run, around in zip(values, spreads, strict=True):
        for i, (value, spread) in enumerate(zip(of_run, around, strict=True)):
            trained = i == len(metrics.COLUMNS) - 1
            classes = ['number', *['trained'] * trained, *['first'] * (i == 0)]
            shown: Any = '–' if value is None else write(value)
            if trained and best and value is not None and value == top:
                shown = tag('b', shown)
            if spread is not None:
                shown = join(shown, tag('small', f' ± {write(spread)}'))
            cells.append(tag('td', shown, class_=' '.join(classes)))
    return cells


def _grouped(runs: Sequence[Run], rows: Sequence[Sequence[Any]]) -> Html:
    """A table with metrics.COLUMNS for every run."""
    count = len(metrics.COLUMNS)
    names = [
        tag('th', name, class_='number first' if i == 0 else 'number')
        for _ in runs
        for i, name in enumerate(metrics.COLUMNS)
    ]
    table = _table(['', *names], rows, 'numbers')
    if len(runs) == 1:
        return table
    groups = [
        tag('th', _label(runs, i), colspan=count, class_='first group') for i in range(len(runs))
    ]
    return Html(table.replace('<thead>', '<thead>' + tag('tr', tag('th'), groups), 1))


def _spoken(key: str) -> str:
    evaluator, metric = key.split('/', 1)
    return f'{evaluator}, {metric.replace("_", " ")}'


# --- Curves --------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> Html | None:
    of_accuracies: dict[str, str] = {}
    for run in runs:
        for keys in curves.accuracies(run.records).values():
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
    return metric.startswith(metrics.PIXELS) or metric.endswith('_std') or '/' in metric


def _chart(runs: Sequence[Run], key: str) -> Html | None:
    """A metric over the steps of all runs that have it; accuracies in per cent."""
    short = key.split('/', 1)[1]
    title = metrics.titles([short]).get(short) if key.startswith('eval/') else None
    scale = 100 if title else 1
    lines, baseline = [], None
    for i, run in enumerate(runs):
        steps, values = curves.series(run.records, key, scale)
        if len(steps):
            name = run.name if len(runs) > 1 else 'now' if run.step < (run.steps or 0) else 'last'
            lines.append(charts.Line(name, _colour(i), steps, values))
        if title and not baseline:
            evaluator, metric = short.split('/', 1)
            pixels = f'eval/{evaluator}/{metrics.PIXELS}{metric}'
            _, values = curves.series(run.records, pixels, scale)
            baseline = ('raw pixels', float(values[-1])) if len(values) else None
    # A value that was measured once has no curve.
    if not lines or max(len(line.steps) for line in lines) < 2:
        return None
    name = f'{title} (%)' if title else short.replace('/', ', ').replace('_', ' ')
    return charts.chart(name, lines, baseline)


# --- Pictures ------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run]) -> Html | None:
    parts = []
    if any(run.views for run in runs):
        drawn = [(_label(runs, i), run.views) for i, run in enumerate(runs) if run.views]
        said = 'What the encoder was shown of the first images: the augmented views of each.'
        parts += [tag('h3', 'Views'), tag('p', said), _side_by_side(drawn)]
    keys = dict.fromkeys(key for run in runs for key in run.pictures.get(run.newest, ()))
    for key in keys:
        evaluator, _, what = key.partition('_')
        parts.append(tag('h3', f'{evaluator}: {what.replace("_", " ")}' if what else evaluator))
        drawn = [
            (_label(runs, i, run.newest.replace('_', ' ')), png)
            for i, run in enumerate(runs)
            if (png := run.pictures.get(run.newest, {}).get(key))
        ]
        parts.append(_side_by_side(drawn))
        before = [
            (_label(runs, i, name), png)
            for folder, name in BEFORE.items()
            for i, run in enumerate(runs)
            if folder != run.newest and (png := run.pictures.get(folder, {}).get(key))
        ]
        if before:
            summary = tag('summary', 'before training')
            parts.append(tag('details', summary, _side_by_side(before)))
    return join(parts) if parts else None


def _side_by_side(drawn: Sequence[tuple[Html, bytes]]) -> Html:
    figures = []
    for caption, png in drawn:
        data = f'data:image/png;base64,{base64.b64encode(png).decode()}'
        wide, high = struct.unpack('>II', png[16:24]) if len(png) > 24 else (None, None)
        alt = re.sub('<[^>]*>', '', caption)
        image = tag('img', src=data, width=wide, height=high, alt=Html(alt))
        figures.append(tag('figure', image, tag('figcaption', caption) if caption else None))
    return tag('div', figures, class_='pictures')


# --- Configuration -------------------------------------------------------------------------------


def _configuration(runs: Sequence[Run]) -> Html:
    base = checkpoint.defaults()
    keys = dict.fromkeys(key for run in runs for key in run.config)
    # 'evals.tsne' without options in one run is not worth a row where another has some.
    keys = [key for key in keys if not any(other.startswith(f'{key}.') for other in keys)]
    said = [_said(run) for run in runs]
    groups: dict[str, list[str]] = {}
    for key in keys:
        if any(key not in base or run.config.get(key) != base[key] for run in runs):
            groups.setdefault(key.partition('.')[0] if '.' in key else 'run', []).append(key)
    tables = [
        (name, [_setting(runs, key, said, base) for key in of_group])
        for name, of_group in groups.items()
    ]
    if len(runs) == 1:
        parts = [tag('div', tag('h3', name), _table([], rows)) for name, rows in tables]
        settings = tag('div', parts, class_='settings')
    else:
        rows = []
        for name, of_group in tables:
            rows += [[tag('th', name, colspan=len(runs) + 1, class_='group')], *of_group]
        settings = _table(_heads(runs), rows)
    left = [key for key in keys if not any(key in of_group for of_group in groups.values())]
    rows = [[key, *(_code(run.config.get(key, _ABSENT)) for run in runs)] for key in left]
    marks = [tag('span', 'set on the command line', class_='said')]
    if len(runs) > 1:
        marks.append(tag('span', 'differs between the runs', class_='differs'))
    return join(
        tag('p', 'What the recipe sets, or sets otherwise than by default. ', marks),
        settings,
        tag('details', tag('summary', f'{len(left)} keys at their defaults'), _table([], rows)),
    )


def _setting(
    runs: Sequence[Run], key: str, said: Sequence[set[str]], base: dict[str, Any]
) -> list[Any]:
    """A row: the key, and its value in each run."""
    values = [run.config.get(key, _ABSENT) for run in runs]
    cells = []
    for value, given in zip(values, said, strict=True):
        marked = ['said'] * (key in given) + ['differs'] * any(v != values[0] for v in values)
        default = f'default: {_plain(base[key])}' if key in base else None
        cells.append(tag('td', _code(value), class_=' '.join(marked) or None, title=default))
    return [key.partition('.')[2] or key, *cells]


def _said(run: Run) -> set[str]:
    """Keys that the command line set, by the newest start."""
    starts = run.environment.get('starts', [])
    words = starts[-1]['command'] if starts else []
    flags = [re.match(r'--?config\.([^=]+)', word) for word in words]
    given = [flag[1] for flag in flags if flag]
    return {key for key in run.config for g in given if key == g or key.startswith(f'{g}.')}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _code(value: Any) -> Html:
    if value is _ABSENT:
        return Html('–')
    return tag('small', 'no options') if value == {} else tag('code', _plain(value))


# --- Data and environment ------------------------------------------------------------------------


def _data(runs: Sequence[Run]) -> Html:
    of_runs = [run.environment.get('data', {}) for run in runs]
    splits = dict.fromkeys(name for data in of_runs for name in data.get('splits', ()))
    rows: list[list[Any]] = [['source', *(run.config['data.source'] for run in runs)]]
    if any(run.config['data.root'] for run in runs):
        rows.append(['directory', *(run.config['data.root'] or '–' for run in runs)])
    for name in splits:
        counts = [data.get('splits', {}).get(name) for data in of_runs]
        rows.append([f'{name} records', *('–' if n is None else f'{n:,}' for n in counts)])
    rows.append(['classes', *(_classes(data.get('classes')) for data in of_runs)])
    rows.append(['bad records', *(_bad(run) for run in runs)])
    return _table(_heads(runs), rows, 'facts')


def _classes(names: Sequence[str] | None) -> Any:
    if names is None:
        return 'not recorded'
    if not names:
        return 'no labels'
    more = f' and {len(names) - LISTED:,} more' if len(names) > LISTED else ''
    return join(f'{len(names):,}: ', tag('small', ', '.join(names[:LISTED]) + more))


def _bad(run: Run) -> Any:
    if not run.bad:
        return 'none'
    rows = [[tag('td', tag('code', record)), reason] for record, reason in run.bad[:LISTED]]
    more = tag('p', f'and {len(run.bad) - LISTED:,} more') if len(run.bad) > LISTED else ''
    return tag('details', tag('summary', f'{len(run.bad):,}'), _table([], rows), more)


def _command(words: Sequence[str]) -> Html:
    # Broken between words, so that none seems to begin with '--' that does not.
    return tag('code', ([tag('span', shlex.quote(word)), ' '] for word in words), class_='command')


def _environment(runs: Sequence[Run]) -> Html:
    starts = [run.environment.get('starts', []) for run in runs]
    newest = [of_run[-1] if of_run else {} for of_run in starts]
    packages = dict.fromkeys(name for start in newest for name in start.get('packages', ()))

    def row(name: str, of: Callable[[dict[str, Any]], Any]) -> list[Any]:
        return [name, *((of(start) or '–') if start else 'not recorded' for start in newest)]

    rows: list[list[Any]] = [['workdir', *(tag('code', run.workdir) for run in runs)]]
    rows += [
        row('command', lambda s: _command(s['command'])),
        ['started', *(', '.join(s['time'] for s in of_run) or 'not recorded' for of_run in starts)],
        row('devices', lambda s: ', '.join(f'{n} × {kind}' for kind, n in s['devices'].items())),
        row('processes', lambda s: s['processes']),
        row('commit', lambda s: s['git'] and tag('code', s['git'])),
        row('system', lambda s: s['system']),
        row('python', lambda s: s['python']),
        *(row(name, lambda s, name=name: s['packages'].get(name)) for name in packages),
    ]
    return _table(_heads(runs), rows, 'facts')
