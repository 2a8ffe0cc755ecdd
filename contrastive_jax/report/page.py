"""The page: one HTML file with everything in it, no script, nothing from elsewhere."""

import base64
import pathlib
import re
import statistics
import struct
from collections.abc import Callable, Sequence
from typing import Any

from contrastive_jax.report import Run, results, settings, tables
from contrastive_jax.report.markup import Html, join, tag

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# 'pixels' is what earlier versions call the baseline's folder.
BEFORE = {'baseline': 'baseline', 'pixels': 'baseline', 'step_0': 'untrained'}


def render(runs: Sequence[Run]) -> str:
    """The page about one run, or about several side by side."""
    sections = {
        'Results': results.evaluations(runs),
        'Curves': results.over_steps(runs),
        'Pictures': _pictures(runs),
        'Configuration': settings.configuration(runs),
        'Data': settings.data(runs),
        'Environment': settings.environment(runs),
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
        return tables.table(tables.heads(runs), rows, 'facts')
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
    speeds = (record.get('train/examples_per_second') for record in run.records)
    found = [speed for speed in speeds if speed]
    return f'{statistics.median(found):,.0f} examples/s' if found else ''


def _devices(run: Run) -> str:
    starts = run.environment.get('starts', [])
    return ', '.join(f'{n} × {kind}' for kind, n in starts[-1]['devices'].items()) if starts else ''


# --- Pictures ------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run]) -> Html | None:
    parts = []
    if any(run.shown for run in runs):
        drawn = [(tables.label(runs, i), run.shown) for i, run in enumerate(runs) if run.shown]
        said = 'What the encoder was shown of the first images: the augmented views of each.'
        parts += [tag('h3', 'Views'), tag('p', said), _side_by_side(drawn)]
    keys = dict.fromkeys(key for run in runs for key in run.pictures.get(run.newest, ()))
    for key in keys:
        evaluator, _, what = key.partition('_')
        parts.append(tag('h3', f'{evaluator}: {what.replace("_", " ")}' if what else evaluator))
        drawn = [
            (tables.label(runs, i, run.newest.replace('_', ' ')), png)
            for i, run in enumerate(runs)
            if (png := run.pictures.get(run.newest, {}).get(key))
        ]
        parts.append(_side_by_side(drawn))
        before = [
            (tables.label(runs, i, name), png)
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
