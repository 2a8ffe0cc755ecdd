"""README and docs: links lead somewhere, commands name what exists, and the door stays small."""

import ast
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import runpy

import pytest
from test_configs import EVERY, presets

from contrastive_jax import losses

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'launch/README.md']
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
NOTEBOOK = ROOT / 'launch/colab/simclr_quickstart.ipynb'
pages = pytest.mark.parametrize('page', TEXT)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r'^```.*?^```', '', TEXT[page], flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Names that GitHub gives to the headings of a page."""
    titles = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def test_the_readme_is_short():
    assert len(TEXT['README.md'].splitlines()) <= 200


@pages
def test_links_and_images_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if re.match(r'\w+:', link):
            continue
        name, _, anchor = link.partition('#')
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), f'{page}: {link}'
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), f'{page}: {link}'


def test_every_page_is_reached_from_the_readme():
    linked = re.findall(r'\]\(([^)#\s]+)', prose('README.md'))
    assert set(TEXT) <= {*linked, 'README.md'}


@pages
def test_paths_and_programs_exist(page):
    folders = 'benchmarks|configs|contrastive_jax|docs|launch|tests'
    for path in re.findall(rf'(?<![\w/.])(?:{folders})/[\w/*-]+\.\w+', TEXT[page]):
        assert list(ROOT.glob(path)), f'{page}: {path}'
    for name in re.findall(r'python -m (contrastive_jax[\w.]*)', TEXT[page]):
        assert importlib.util.find_spec(name), f'{page}: {name}'


def test_python_that_is_shown_names_what_exists():
    """All that README, docs and the notebook import from this package and use of it."""
    fence = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)
    cells = [c for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
    shown = [code for text in TEXT.values() for code in fence.findall(text)]
    shown.append('\n'.join(''.join(cell['source']) for cell in cells))
    used = 0
    for code in shown:
        nodes = list(ast.walk(ast.parse(code)))
        modules = {'contrastive_jax': importlib.import_module('contrastive_jax')}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == 'contrastive_jax':
                for alias in node.names:
                    modules[alias.name] = importlib.import_module(f'contrastive_jax.{alias.name}')
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.value.id
                used += name in modules
                assert name not in modules or hasattr(modules[name], node.attr), ast.unparse(node)
    assert used >= 4


@pages
def test_configs_and_presets_that_are_named_build(page):
    for name, preset in set(re.findall(r'\b(\w+)\.py(?::(\w+))?', TEXT[page])):
        path = ROOT / 'configs' / f'{name}.py'
        if path.exists():
            runpy.run_path(str(path))['get_config'](preset or None)
        else:
            assert not preset, f'{page}: {name}.py:{preset}'


def keys(tree, above=''):
    """All keys of a config and of the dicts in it, with what leads to them."""
    for name, value in tree.items():
        yield f'{above}{name}'
        if hasattr(value, 'items'):
            yield from keys(value, f'{above}{name}.')


def test_keys_that_are_named_can_be_set():
    known = set()
    for config in EVERY:
        for preset in presets(config):
            known |= set(keys(runpy.run_path(str(config))['get_config'](preset)))
    for page in TEXT:
        for key in re.findall(r'(?:--|`)config\.(\w[\w.]*\w)(?=[=`])', TEXT[page]):
            assert key in known or key == 'json', f'{page}: config.{key}'


def test_presets_are_listed_where_the_configs_say():
    """docs/presets.md has every preset of every config, and no other."""
    *sections, evaluators = re.split(r'^## ', TEXT['docs/presets.md'], flags=re.MULTILINE)[1:]
    listed = {}
    for section in sections:
        shared = re.findall(r'^\| `:(\w+)`', section, re.MULTILINE)
        for name, own in re.findall(r'^\| \[`(\w+)\.py`\]\S+ \|(.*)\|$', section, re.MULTILINE):
            listed[name] = {*shared, *re.findall(r'`:(\w+)`', own)}
    listed['eval'] = set(re.findall(r'^\| `:(\w+)`', evaluators, re.MULTILINE))
    for config in EVERY:
        assert listed.pop(config.stem) == set(presets(config)), config.name
        own = set(re.findall(r'`:(\w+)`', runpy.run_path(str(config))['__doc__']))
        assert own <= set(presets(config)), config.name
    assert not listed


def test_losses_have_the_arguments_that_their_table_names():
    rows = re.findall(r'^\| (`\w+\(.*?) \|', TEXT['docs/methods.md'], re.MULTILINE)
    calls = [call for row in rows for call in re.findall(r'`(\w+)\((.*?)\)`', row)]
    assert len(calls) >= len(rows) > 10
    for name, arguments in calls:
        signature = inspect.signature(getattr(losses, name))
        for argument in re.findall(r'\w+(?==|,|$)', re.sub(r'=[^,]*', '', arguments)):
            assert argument in signature.parameters, f'{name}: {argument}'
