"""Runs that start from modules of another run: `config.init_modules`."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from contrastive_jax import experiment, parallel, train
from contrastive_jax.config import UserError
from contrastive_jax.workdir import checkpoint, records, runs

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ('encoder', 'projector')


def recipe(name='simclr_resnet', **keys):
    """The digits' preset of a method, as small as it gets, with BatchNorm in encoder and head."""
    config = runpy.run_path(str(ROOT / f'configs/{name}.py'))['get_config']('digits')
    with config.unlocked():
        config.update({'total_steps': 1, 'batch_size': 16, 'evals': {}, 'seed': 1})
        config.model.update({'widths': (8,), 'blocks': (1,)})
        config.method.update({'hidden': 16, 'projection': 8})
        config.inputs.augment = {}
        config.update_from_flattened_dict(keys)
    return config


@pytest.fixture(autouse=True)
def mesh(monkeypatch):
    """One device, which compiles sooner."""
    one = parallel.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(parallel, 'make_mesh', lambda devices=None: one)
    with jax.set_mesh(one):
        yield one


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A workdir whose weights are no run's: every number is another."""
    workdir, config = tmp_path_factory.mktemp('run'), recipe(seed=0)
    one = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(one):
        state = experiment.open(config, None, one).init()
    rng = np.random.default_rng(0)
    params, extra = jax.tree.map(
        lambda x: np.asarray(x) + rng.random(x.shape, np.float32), (state.params, state.extra)
    )
    checkpoint.claim(workdir, config.to_dict())
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
    checkpoints.save(state._replace(params=params, extra=extra), None, 3)
    checkpoints.close()
    return workdir, params, extra['stats']


def started(mesh, run, modules, name='simclr_resnet', **keys):
    """The state that a run starts from."""
    config = recipe(name, init_from=str(run[0]), init_modules=modules, **keys)
    return experiment.open(config, None, mesh).init()


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_modules_start_with_the_weights_and_averages_of_another_run(mesh, run):
    _, params, stats = run
    random = experiment.open(recipe(), None, mesh).init()
    for modules in (MODULES, ('projector',)):
        state = started(mesh, run, modules)
        for name in MODULES:
            from_run = name in modules
            assert equal(state.params[name], (params if from_run else random.params)[name])
            averages = state.extra['stats'][name]
            assert equal(averages, (stats if from_run else random.extra['stats'])[name])
        assert jax.tree.structure(state) == jax.tree.structure(random)
        assert int(state.step) == 0


def test_a_target_network_starts_as_a_copy_of_the_given_module(mesh, run):
    _, params, stats = run
    state = started(mesh, run, ('encoder',), 'byol')
    target = state.extra['target']
    for found in (state.params, target['params']):
        assert equal(found['encoder'], params['encoder'])
    for found in (state.extra['stats'], target['stats']):
        assert equal(found['encoder'], stats['encoder'])
    assert equal(target['params']['projector'], state.params['projector'])


def test_a_run_of_them_trains_resumes_and_is_evaluated_from_where_it_started(run, tmp_path):
    keys = {'init_from': str(run[0]), 'init_modules': MODULES}
    train.run(recipe(**keys), str(tmp_path))
    assert tuple(runs.config_of(tmp_path).init_modules) == MODULES
    train.run(recipe(**keys), str(tmp_path))  # which is complete
    with pytest.raises(UserError, match=r'config\.init_modules: there \[.*\], here \[\]'):
        train.run(recipe(init_from=str(run[0])), str(tmp_path))
    config = recipe(**keys)
    with config.unlocked():
        config.evals = {'collapse': {}}
    train.run(config, str(tmp_path), eval_only=True)
    values = [r['eval/collapse/rank'] for r in records.read(tmp_path) if 'eval/collapse/rank' in r]
    trained, start = values
    # One step moves it little; random weights have another rank.
    random = recipe(evals={})
    with random.unlocked():
        random.evals = {'collapse': {}}
    train.run(random, str(tmp_path / 'random'))
    other = next(r for r in records.read(tmp_path / 'random') if 'eval/collapse/rank' in r)
    assert abs(trained - start) < 0.2 * abs(other['eval/collapse/rank'] - start)


@pytest.mark.parametrize(
    ('modules', 'keys', 'expected'),
    [
        (
            ('encoder', 'projector'),
            {'method.hidden': 24},
            r'config\.init_modules: those of .*run\d do not fit; 6 differ, first:\n'
            r'  projector/linear1/kernel: here \(8, 24\), there \(8, 16\)',
        ),
        (
            ('encoder',),
            {'model.blocks': (2,)},
            r'do not fit; \d+ differ, first:\n  encoder/stage1_block1/.*: here .*there missing',
        ),
        (('predictor',), {}, r"unknown module of this run 'predictor'.*'encoder', 'projector'"),
        (('projektor',), {}, r"this run 'projektor'\. Did you mean 'projector'"),
    ],
)
def test_what_does_not_fit_is_listed(mesh, run, modules, keys, expected):
    with pytest.raises(UserError, match=expected):
        started(mesh, run, modules, **keys)


def test_mistakes(mesh, run, tmp_path):
    with pytest.raises(UserError, match=r"module of .*run\d 'predictor'.*'encoder', 'projector'"):
        started(mesh, run, ('predictor',), 'byol')
    with pytest.raises(
        UserError, match=r'config\.init_modules: got .*config.init_from.* is not set'
    ):
        experiment.open(recipe(init_modules=MODULES), None, mesh)
    file = tmp_path / 'vit.safetensors'
    file.touch()
    config = recipe(init_from=str(file), init_modules=MODULES)
    with pytest.raises(UserError, match='is a file of weights, which has encoders alone'):
        experiment.open(config, None, mesh)
