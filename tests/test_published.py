"""Presets that name a paper are that paper's, key by key: tests/published.toml."""

import math
import pathlib
import runpy
import tomllib

import pytest

from contrastive_jax import config as config_lib
from contrastive_jax import optim

HERE = pathlib.Path(__file__).parent
PUBLISHED = tomllib.loads((HERE / 'published.toml').read_text())


def effective(name):
    """Every key that the preset's run depends on, flat: what it sets, and defaults for the rest."""
    file, preset = name.split(':')
    config = runpy.run_path(str(HERE.parent / 'configs' / f'{file}.py'))['get_config'](preset)
    found = config_lib.completed(config.to_dict())
    options = {**found['optim'], 'modules': None, 'warmup': 0.0}
    _, schedule = optim.make(**options, total_steps=100, batch_size=found['batch_size'])
    return config_lib.flatten(found) | {'peak': float(schedule(0))}


def plain(value):
    return list(map(plain, value)) if isinstance(value, list | tuple) else value


def equal(got, want):
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(map(equal, got, want))
    if isinstance(want, str | bool) or not isinstance(got, int | float) or isinstance(got, bool):
        return got == want
    return math.isclose(got, want, rel_tol=1e-5)


@pytest.mark.parametrize('name', PUBLISHED)
def test_presets_are_the_papers(name):
    wanted = config_lib.flatten(PUBLISHED[name])
    assert len(wanted.pop('source')) > 20
    found = effective(name)
    wrong = [
        f'{key}: published {want!r}, here {plain(found.get(key, "(no such key)"))!r}'
        for key, want in wanted.items()
        if not equal(plain(found.get(key)), want)
    ]
    assert not wrong, '\n'.join(wrong)


def test_the_tables_size():
    """Says how much is held: presets and keys."""
    keys = sum(len(config_lib.flatten(table)) - 1 for table in PUBLISHED.values())
    print(f'{len(PUBLISHED)} presets, {keys} keys')
    assert keys >= 400
