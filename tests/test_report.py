"""The page of a run: all of it is there, nothing from elsewhere, and nothing breaks out of it."""

import base64
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from pictures import encoded, photo, write

from contrastive_jax import report
from contrastive_jax.config import UserError
from contrastive_jax.report import page
from contrastive_jax.report.markup import Html, join, tag
from contrastive_jax.workdir import environment, records

ROOT = pathlib.Path(__file__).parents[1]
EVIL = '<script>alert("1")</script>&\'</td>'
VOID = ('meta', 'img', 'br')


class Parsed(html.parser.HTMLParser):
    """Elements and text of a page whose tags must nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, text):
        """Cells of the table rows of which one is this."""
        found = re.findall(r'<tr>(.*?)</tr>', text, re.S)
        return [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row, re.S) for row in found]


def run(
    workdir, name='simclr', temperature=0.1, steps=20, command=(), evil='', baseline='baseline'
):
    """A workdir as a run leaves it."""
    config = {
        'batch_size': 16,
        'total_steps': steps,
        'data': {'source': f'folder{evil}', 'root': f'/data/{evil}'},
        'method': {'name': name, 'temperature': temperature},
        'model': {'name': 'vit', 'width': 16},
        'evals': {'knn': {'k': 20}, f'tsne{evil}': {}},
    }
    write(workdir / 'config.json', json.dumps(config).encode())
    logged = [
        {'step': 0, 'eval/knn/pixels_top1': 0.41, 'eval/knn/top1': 0.32, 'eval/collapse/rank': 3.5},
        {'step': 10, 'train/loss': 5.0, 'train/learning_rate': 0.1, f'train/{evil or "x"}': 1.0},
        {'step': 20, 'train/loss': 2.5, 'train/learning_rate': 0.0, f'train/{evil or "x"}': 2.0},
        {'step': 20, 'eval/knn/top1': 0.527, 'eval/knn/top1_std': 0.013, 'eval/collapse/rank': 9.0},
    ]
    write(workdir / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in logged).encode())
    write(workdir / 'measures.json', json.dumps({'knn/top1': ('knn', '%')}).encode())
    write(workdir / 'parameters.txt', b'...\nTotal: 1,234 -- 5 bytes\n')
    bad = {'record': f'{evil}.png', 'reason': f'truncated {evil}'}
    write(workdir / 'bad_records.jsonl', (json.dumps(bad) + '\n{"rec').encode())
    start = {
        'time': '2026-01-02T03:04:05+00:00',
        'command': ['python', '-m', 'contrastive_jax.main', *command],
        'python': '3.11.9',
        'system': evil or 'Linux',
        'packages': {'jax': '0.10.2'},
        'devices': {'cpu': 2},
        'processes': 1,
        'git': 'c0ffee',
    }
    data = {'splits': {'train': 50_000, 'test': 10_000}, 'classes': ['cat', f'dog{evil}']}
    write(workdir / 'environment.json', json.dumps({'data': data, 'starts': [start]}).encode())
    pngs = []
    for i, file in enumerate(
        ['views.png', 'pictures/step_20/tsne_map.png', 'pictures/step_20/knn_confusion.png',
         'pictures/step_0/tsne_map.png', f'pictures/{baseline}/tsne_map.png']
    ):  # fmt: skip
        pngs.append(encoded(photo(100 * steps + i, 20 + i, 30), 'PNG'))
        write(workdir / file, pngs[-1])
    # Of steps in between, and what a kill left.
    write(workdir / 'pictures/step_10/tsne_map.png', encoded(photo(7), 'PNG'))
    write(workdir / 'pictures/step_20/.knn.png.tmp', b'half')
    return pngs


def check(text, pngs):
    """Everything inlined, nothing from elsewhere; returns what was parsed."""
    parsed = Parsed(text)
    assert not {'script', 'link', 'iframe', 'object', 'base'} & {t for t, _ in parsed.elements}
    assert not re.search(r'https?:', text)
    assert not re.search(r'@import|url\(', text)
    for _, attributes in parsed.elements:
        assert not any(key.startswith('on') for key in attributes)
        assert attributes.get('href', '#').startswith('#')
    sources = [image['src'].partition(',') for image in parsed.named('img')]
    assert {kind for kind, *_ in sources} <= {'data:image/png;base64'}
    assert sorted(base64.b64decode(data) for *_, data in sources) == sorted(pngs)
    return parsed


def test_one_run(tmp_path):
    pngs = run(tmp_path / 'first', command=['--config=a.py', '--config.method.temperature=0.1'])
    text = page.render(report.read([str(tmp_path / 'first')]))
    parsed = check(text, pngs)
    assert parsed.named('img')[0]['width'] == '30'
    said = ' '.join(parsed.texts)
    for expected in ('first', 'simclr', '1,234 parameters', '50,000', 'c0ffee', '0.10.2', '.png'):
        assert expected in said, expected
    rows = parsed.rows(text)
    assert ['knn', '41.0', '32.0', '<b>52.7</b><small> ± 1.3</small>'] in rows
    assert ['collapse, rank', '–', '3.5', '9'] in rows
    given = re.findall(r'<td class="said">(.*?)</td>', text)
    assert given == ['<code>0.1</code>']
    # Named without options, and yet there; defaults are apart.
    assert ['tsne', '<small>no options</small>'] in rows
    before, _, defaults = text.partition('keys at their defaults')
    assert '<th>temperature</th>' in before
    assert '<th>accumulate</th>' in defaults
    assert len(parsed.named('polyline')) == 5  # loss, learning rate, kNN, rank, x


def test_several_runs_are_side_by_side(tmp_path):
    pngs = run(tmp_path / 'a/run') + run(tmp_path / 'b/run', 'moco', steps=40)
    pngs += run(tmp_path / 'c', temperature=0.5, steps=60, baseline='pixels')
    workdirs = [str(tmp_path / name) for name in ('a/run', 'b/run', 'c')]
    text = page.render(report.read(workdirs))
    parsed = check(text, pngs)
    title = parsed.texts[parsed.texts.index(f'{workdirs[0]} and {workdirs[1]} and c')]
    assert title
    rows = parsed.rows(text)
    (knn,) = [row for row in rows if row[0] == 'knn']
    assert knn[1:3] == knn[4:6] == ['41.0', '32.0']
    assert len(knn) == 10
    # Three lines in each chart of loss, learning rate, kNN, rank and x.
    assert len(parsed.named('polyline')) == 15
    (method,) = [row for row in rows if row[0] == 'name' and 'simclr' in row[1]]
    assert method[1:] == ['<code>simclr</code>', '<code>moco</code>', '<code>simclr</code>']
    assert text.count('<td class="differs"') == 9  # name, temperature, total_steps
    assert '20 of 40' in text


def test_what_users_write_is_escaped(tmp_path):
    pngs = run(tmp_path / 'a', evil=EVIL, command=[f'--config.model.name={EVIL}'])
    path = tmp_path / f'pictures {EVIL}'.replace('/', '⁄')
    pngs += run(path, f'moco{EVIL}', evil=EVIL)
    text = page.render(report.read([str(tmp_path / 'a'), str(path)]))
    parsed = check(text, pngs)
    assert EVIL not in text
    said = ''.join(parsed.texts)
    assert said.count(EVIL) > 10
    assert f'dog{EVIL}' in said
    assert f'moco{EVIL}' in said
    assert f'truncated {EVIL}' in said


def test_of_little_there_is_a_page_too(tmp_path):
    """A run that has just started, and one that is older than environment.json."""
    write(tmp_path / 'new/config.json', b'{"method": {"name": "simclr"}}')
    run(tmp_path / 'old')
    os.remove(tmp_path / 'old/environment.json')
    write(tmp_path / 'old/environment.json', b'{"data"')
    text = page.render(report.read([str(tmp_path / 'new')]))
    check(text, [])
    assert '<h2>Results' not in text
    assert 'not recorded' in page.render(report.read([str(tmp_path / n) for n in ('old', 'new')]))
    with pytest.raises(UserError, match='no run in'):
        report.read([str(tmp_path)])


def test_markup():
    assert tag('p', 'a<b', [Html('<i></i>'), None, 3], class_='"', data_x=None) == (
        '<p class="&quot;">a&lt;b<i></i>3</p>'
    )
    assert join('&', tag('br')) == '&amp;<br>'


def report_command(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'contrastive_jax.report', *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command(tmp_path):
    pngs = run(tmp_path / 'a') + run(tmp_path / 'b', steps=30)
    out = tmp_path / 'new/page.html'
    done = report_command(
        f'--workdir={tmp_path / "a"}', f'--compare={tmp_path / "b"}', f'--out={out}'
    )
    assert done.returncode == 0, done.stderr
    check(out.read_text(), pngs)
    assert [p.name for p in out.parent.iterdir()] == ['page.html']


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        (['--workdir=x', '--out=page.pdf'], '.html'),
        (['--workdir=x', '--compare=x'], 'twice'),
        ([], '--workdir is required'),
    ],
)
def test_mistakes_on_the_command_line(flags, expected):
    done = report_command(*flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert 'Traceback' not in done.stderr


# --- environment.json ----------------------------------------------------------------------------


class Source(list):
    classes = ('cat', 'dog')


def test_every_start_is_recorded(tmp_path, monkeypatch):
    assert environment.read(tmp_path) == {}
    monkeypatch.setattr(sys, 'orig_argv', ['/usr/bin/python3', '-m', 'x', '--config=a.py'])
    for size in (3, 4):
        environment.record(str(tmp_path), {'train': Source('a' * size), 'test': Source('b')})
    found = environment.read(tmp_path)
    assert found['data'] == {'splits': {'train': 4, 'test': 1}, 'classes': ['cat', 'dog']}
    assert len(found['starts']) == 2
    start = found['starts'][0]
    assert start['command'] == ['python3', '-m', 'x', '--config=a.py']
    assert start['devices'] == {'cpu': 8}
    assert start['packages']['jax']
    assert [p.name for p in tmp_path.iterdir()] == ['environment.json']


def test_the_commit_of_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert environment._git() is None

    def git(*words):
        name = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        command = ['git', *name, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git('init')
    (tmp_path / 'a').write_text('1')
    git('add', 'a')
    git('commit', '-m', 'x')
    commit = git('rev-parse', 'HEAD')
    assert environment._git() == commit
    (tmp_path / 'untracked').write_text('1')
    assert environment._git() == commit
    (tmp_path / 'a').write_text('2')
    assert environment._git() == f'{commit}, changed'
    monkeypatch.setenv('PATH', '')
    assert environment._git() is None


def test_the_closing_table_and_the_page_have_the_same_rows(tmp_path, capsys):
    logged = [
        {'step': 0, 'eval/knn/top1': 0.3, 'eval/knn/baseline_top1': 0.2, 'eval/knn/top1_std': 0.1},
        {'step': 5, 'eval/knn/top1': 0.5, 'eval/knn/top1_10_per_class': 0.4},
        {'step': 9, 'eval/knn/top1': 0.6, 'train/loss': 1.0, 'eval/retrieval/a_to_b_r5': None},
    ]
    found = records.evaluations(logged)
    assert found == {
        'knn/top1': [0.2, 0.3, 0.6],
        'knn/top1_10_per_class': [None, None, 0.4],
        'retrieval/a_to_b_r5': [None, None, None],
    }
    run(tmp_path)
    write(tmp_path / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in logged).encode())
    measures = {
        'knn/top1': ('knn, all labels', '%'),
        'knn/top1_10_per_class': ('knn, 10 labels per class', '%'),
        'retrieval/a_to_b_r5': ('', ''),
    }
    records.describe(str(tmp_path), measures)
    records.summary(str(tmp_path), 500)
    printed = capsys.readouterr().out
    page_ = page.render(report.read([str(tmp_path)]))
    for title in ('knn, all labels', 'knn, 10 labels per class'):
        assert title in printed
        assert title in page_
    assert 'a to b' not in printed
    assert json.loads((tmp_path / 'results.json').read_text()) == {
        'knn, all labels': {'baseline': 0.2, 'untrained': 0.3, 'trained': 0.6},
        'knn, 10 labels per class': {'baseline': None, 'untrained': None, 'trained': 0.4},
    }
