"""The house: which way imports go, and that shared code names no method."""

import ast
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

from contrastive_jax import evals, methods, models

PACKAGE = pathlib.Path(methods.__file__).parents[1]
FILES = sorted(PACKAGE.rglob('*.py'))


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f'{node.module}.{a.name}' for a in node.names}
    return found


def inside(path, *folders):
    return path.relative_to(PACKAGE).parts[0] in folders


def test_no_utils_and_no_long_files():
    for path in FILES:
        assert path.stem not in ('utils', 'util', 'common', 'helpers')
        assert len(path.read_text().splitlines()) <= 450, f'{path.name} is too long'


@pytest.mark.parametrize(
    ('folders', 'forbidden'),
    [
        # Losses, models, data and augmentation know nothing of training.
        (
            (
                'losses',
                'models',
                'augment',
                'data',
                'similarity.py',
                'tiles.py',
                'heads.py',
                'optim.py',
            ),
            ('train', 'main', 'state', 'methods', 'evals', 'checkpoint', 'metrics'),
        ),
        # A method knows losses and models, not the trainer, the data or a device.
        (('methods',), ('train', 'main', 'state', 'data', 'evals', 'checkpoint', 'parallel')),
        (('evals',), ('train', 'main', 'state', 'methods', 'checkpoint')),
        (('state.py', 'method.py', 'checkpoint.py', 'metrics.py'), ('train', 'main', 'methods')),
    ],
)
def test_import_directions(folders, forbidden):
    for path in FILES:
        if inside(path, *folders):
            for name in imports(path):
                for part in forbidden:
                    assert not re.match(rf'contrastive_jax\.{part}(\.|$)', name), f'{path}: {name}'


def test_shared_code_names_no_method_model_or_evaluator():
    names = [
        m.name
        for package in (methods, models, evals)
        for m in pkgutil.iter_modules(package.__path__)
    ]
    for path in FILES:
        if inside(path, 'methods', 'models', 'evals', 'data'):
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
