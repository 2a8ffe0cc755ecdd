"""The sections of what went in: configuration, data, and what the run was started on."""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from contrastive_jax.config import defaults
from contrastive_jax.report import Run, tables
from contrastive_jax.report.markup import Html, join, tag

LISTED = 40  # classes and bad records that are shown
_ABSENT = object()


def configuration(runs: Sequence[Run]) -> Html:
    base = defaults()
    keys = dict.fromkeys(key for run in runs for key in run.config)
    # 'evals.tsne' without options in one run is not worth a row where another has some.
    keys = [key for key in keys if not any(other.startswith(f'{key}.') for other in keys)]
    said = [_said(run) for run in runs]
    groups: dict[str, list[str]] = {}
    for key in keys:
        if any(key not in base or run.config.get(key) != base[key] for run in runs):
            groups.setdefault(key.partition('.')[0] if '.' in key else 'run', []).append(key)
    named = [
        (name, [_setting(runs, key, said, base) for key in of_group])
        for name, of_group in groups.items()
    ]
    if len(runs) == 1:
        parts = [tag('div', tag('h3', name), tables.table([], rows)) for name, rows in named]
        settings = tag('div', parts, class_='settings')
    else:
        rows = []
        for name, of_group in named:
            rows += [[tag('th', name, colspan=len(runs) + 1, class_='group')], *of_group]
        settings = tables.table(tables.heads(runs), rows)
    left = [key for key in keys if not any(key in of_group for of_group in groups.values())]
    rows = [[key, *(_code(run.config.get(key, _ABSENT)) for run in runs)] for key in left]
    marks = [tag('span', 'set on the command line', class_='said')]
    if len(runs) > 1:
        marks.append(tag('span', 'differs between the runs', class_='differs'))
    return join(
        tag('p', 'What the recipe sets, or sets otherwise than by default. ', marks),
        settings,
        tag(
            'details', tag('summary', f'{len(left)} keys at their defaults'), tables.table([], rows)
        ),
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


def data(runs: Sequence[Run]) -> Html:
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
    return tables.table(tables.heads(runs), rows, 'facts')


def _classes(found: Mapping[str, Sequence[str]] | Sequence[str] | None) -> Any:
    if found is None:
        return 'not recorded'
    if not found:
        return 'no labels'
    # Earlier versions knew one label.
    labels = found if isinstance(found, Mapping) else {'label': found}
    return join(
        *(
            tag('div', f'{name}, ' if len(labels) > 1 else '', *_names(names))
            for name, names in labels.items()
        )
    )


def _names(names: Sequence[str]) -> list[Any]:
    more = f' and {len(names) - LISTED:,} more' if len(names) > LISTED else ''
    return [f'{len(names):,}: ', tag('small', ', '.join(names[:LISTED]) + more)]


def _bad(run: Run) -> Any:
    if not run.bad:
        return 'none'
    rows = [[tag('td', tag('code', record)), reason] for record, reason in run.bad[:LISTED]]
    more = tag('p', f'and {len(run.bad) - LISTED:,} more') if len(run.bad) > LISTED else ''
    return tag('details', tag('summary', f'{len(run.bad):,}'), tables.table([], rows), more)


def _command(words: Sequence[str]) -> Html:
    # Broken between words, so that none seems to begin with '--' that does not.
    return tag('code', ([tag('span', shlex.quote(word)), ' '] for word in words), class_='command')


def environment(runs: Sequence[Run]) -> Html:
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
    return tables.table(tables.heads(runs), rows, 'facts')
