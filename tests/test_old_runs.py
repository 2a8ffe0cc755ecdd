"""A workdir of an earlier version still resumes, evaluates and loads.

fixtures/run_before_inputs.zip was made by commit f7537c3, the last one before config.inputs: eight
steps of a tiny SimCLR on the digits, of which the workdir holds the first four; expected.jsonl is
the rest of its metrics. That the bits are equal, too, is measured by benchmarks/same_bits.py: other
processors round otherwise.
"""

import json
import pathlib
import runpy
import zipfile

import jax
import numpy as np
import pytest

import contrastive_jax
from contrastive_jax import parallel, report, train
from contrastive_jax.report import page
from contrastive_jax.workdir import records, runs

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The workdir, on one device, as it was trained."""
    make = parallel.make_mesh
    monkeypatch.setattr(parallel, 'make_mesh', lambda devices=None: make(jax.devices()[:1]))
    monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])
    with zipfile.ZipFile(ROOT / 'tests/fixtures/run_before_inputs.zip') as file:
        file.extractall(tmp_path)
    return tmp_path


def recipe():
    """The same run in today's keys."""
    config = runpy.run_path(str(ROOT / 'configs/simclr_vit.py'))['get_config']()
    with config.unlocked():
        config.update({'total_steps': 8, 'batch_size': 32, 'checkpoint_every': 4, 'log_every': 1})
        config.model.update({'width': 16, 'depth': 1, 'heads': 2})
        config.method.update({'hidden': 16, 'projection': 8})
        config.evals = {'knn': {'k': 20}, 'collapse': {}}
    return config


def test_it_resumes_and_evaluates_to_the_same_numbers(old):
    expected = [json.loads(x) for x in (old / 'expected.jsonl').read_text().splitlines()]
    train.run(recipe(), str(old))
    found = [r for r in records.read(str(old)) if r['step'] > 4]
    assert [r['step'] for r in found] == [r['step'] for r in expected] == [5, 6, 7, 8, 8]
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            # A hundredth: five of the 500 test images.
            near = {'abs': 0.01} if '/knn/' in key else {'rel': 1e-3, 'abs': 1e-6}
            assert ours[key] == pytest.approx(value, **near), (ours['step'], key)
    # The baselines were recorded under their old names.
    table = json.loads((old / 'results.json').read_text())
    assert table['knn, all labels']['baseline'] == 0.984
    assert 'knn, all labels' in page.render(report.read([str(old)]))


def test_it_loads_and_a_new_run_starts_from_it(old):
    config = runs.config_of(old)
    assert (config.inputs.name, config.inputs.size, config.inputs.views) == ('images', 16, 2)
    assert config.inputs.augment.cutout.prob == 0.5
    assert 'augment' not in config
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    assert contrastive_jax.load(old)(images).shape == (3, 16)
    with zipfile.ZipFile(ROOT / 'tests/fixtures/run_before_inputs.zip') as file:
        written = json.loads(file.read('config.json'))
    assert contrastive_jax.load(old).identity() == written
