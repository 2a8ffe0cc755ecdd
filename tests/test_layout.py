"""The house: its floors, how long files are, and that shared code names no method."""

import ast
import pathlib
import pkgutil
import re
import subprocess
import sys

import reading

from contrastive_jax import evals, methods, models

PACKAGE = pathlib.Path(methods.__file__).parents[1]
FILES = sorted(PACKAGE.rglob('*.py'))


# From the ground up: a room (a folder or a file of the package) may import what lies below it, and
# nothing beside or above it.
FLOORS = (
    ('config', 'figures', 'schedules'),
    ('parameters',),
    ('similarity', 'augment', 'data', 'optim', 'parallel', 'planning', 'recipes'),
    ('losses', 'inputs'),
    ('layers',),
    ('models',),
    ('method',),
    ('networks',),
    ('methods', 'state', 'weights'),
    ('workdir',),
    ('evaluation',),
    ('evals',),
    ('experiment',),
    ('inference',),
    ('index', 'train'),
    ('cli',),
    ('main', 'embed', 'search', 'export', 'plan', 'report'),
)
# Lines of a file: none is longer than a reader can hold. Methods and recipes are read the most.
LONGEST = {'methods': 200, 'configs': 70}
LONGEST_FILE = 400
# Where docstrings begin with a verb or with the noun itself.
SPOKEN = (
    *('augment', 'data', 'figures', 'layers', 'losses', 'models', 'planning', 'report'),
    *('similarity', 'weights'),
)


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
    """Dotted names of what a file imports from this package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f'{node.module}.{a.name}' for a in node.names}
    return {name for name in found if name.startswith('contrastive_jax.')}


def test_every_room_stands_on_one_floor():
    rooms = [name for floor in FLOORS for name in floor]
    assert len(rooms) == len(set(rooms))
    there = {room(path) for path in FILES} - {'__init__'}
    assert there == set(rooms)


def test_imports_go_down():
    height = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for path in FILES:
        here = room(path)
        if here == '__init__':
            continue
        for name in imports(path):
            there = name.split('.')[1]
            if there in height and there != here:
                assert height[there] < height[here], f'{path}: {name}'


def test_no_utils_and_no_long_files():
    configs = (PACKAGE.parent / 'configs').glob('*.py')
    for path in [*FILES, *configs]:
        assert path.stem not in ('utils', 'util', 'common', 'helpers')
        most = LONGEST.get(path.parent.name, LONGEST_FILE)
        count = len(path.read_text().splitlines())
        assert count <= most, f'{path}: {count} lines, at most {most}'


def test_docstrings_begin_with_a_verb_or_a_noun():
    folders = [PACKAGE / name for name in SPOKEN]
    folders += [PACKAGE.parent / name for name in ('benchmarks', 'configs')]
    for path in [path for folder in folders for path in folder.rglob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            # Strings that stand alone, which docstrings of attributes are, too.
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                said = str(node.value.value).split()[:1]
                assert said not in (['What'], ['How'], ['Of']), f'{path}:{node.lineno}'


def test_the_first_read_is_short():
    read = {name: reading.lines_of_code(PACKAGE / name) for name in reading.FIRST_READ}
    assert sum(read.values()) <= 600, read


def test_shared_code_does_not_say_what_a_record_is():
    """Records become batches and are trained on by code that works for every kind of data."""
    shared = ['train.py', 'state.py', 'experiment.py', 'inputs/pipeline.py']
    paths = [PACKAGE / name for name in shared] + sorted((PACKAGE / 'workdir').glob('*.py'))
    for path in paths:
        # Not a part of another word, such as batch_size.
        words = r'(?<![a-z_])(?:image|view|crop|pixel|size)s?(?![a-z])'
        found = re.findall(words, path.read_text())
        assert not found, f'{path}: {set(found)}'


def test_shared_code_names_no_method_model_or_evaluator():
    names = [
        m.name
        for package in (methods, models, evals)
        for m in pkgutil.iter_modules(package.__path__)
    ]
    for path in FILES:
        if room(path) in ('methods', 'models', 'evals', 'data'):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                for constant in ast.walk(node):
                    if isinstance(constant, ast.Constant):
                        assert constant.value not in names, f'{path}:{node.lineno}'
        for name in imports(path):
            assert not re.match(r'contrastive_jax\.(methods|models|evals)\.', name), path


def test_shard_map_lives_in_the_engine_alone():
    for path in FILES:
        if path.name not in ('tiles.py', 'parallel.py'):
            text = path.read_text()
            assert 'jax.shard_map' not in text, path
            assert 'pmap' not in text, path


def test_the_base_install_imports_no_tensorflow():
    code = (
        'import sys, contrastive_jax.train, contrastive_jax.main\n'
        'from contrastive_jax.data import open_splits\n'
        "open_splits({'source': 'digits'})\n"
        "bad = [m for m in ('tensorflow', 'tensorflow_datasets', 'torch', 'pandas') "
        'if m in sys.modules]\n'
        'sys.exit(str(bad) if bad else 0)'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


def test_nothing_names_a_path_of_one_machine():
    for path in PACKAGE.parent.glob('**/*.py'):
        if '.venv' not in path.parts:
            assert not re.search(r'["\'](/work|/root|/home|/tmp)/', path.read_text()), path
