"""Every config and every preset builds, and its step runs abstractly on its own shapes."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest

from contrastive_jax import experiment as programs
from contrastive_jax import parallel
from contrastive_jax.config import UserError, base, build

EVERY = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))
CONFIGS = [path for path in EVERY if path.stem != 'eval']  # which trains nothing


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def presets(path):
    """The presets of a config, from the error for one that it does not have."""
    with pytest.raises(UserError, match='unknown preset') as error:
        load(path).get_config('nonesuch')
    return re.findall(r"'(\w+)'", str(error.value).split('Exists:')[1])


ALL = [(path, name) for path in CONFIGS for name in presets(path)]


SHALLOW = {
    'resnet': lambda stages: {'blocks': (1,) * stages},
    'vit': lambda stages: {'depth': 1},
    'nin': lambda stages: {'blocks': 2},
    'dcgan': lambda stages: {'widths': (8, 8)},
}


class Blank:
    """As many images as a preset needs, of which none is read."""

    classes = {'label': ['a', 'b']}  # noqa: RUF012

    def __len__(self):
        return 50_000

    def __getitem__(self, index):
        return {'image': np.zeros((8, 8, 3), np.uint8), 'label': 0, 'captions': ['a']}

    def captions(self, index):
        return ['a blank']

    def describe(self, index):
        return f'blank[{index}]'


@pytest.mark.parametrize(('path', 'name'), ALL, ids=[f'{p.stem}:{n}' for p, n in ALL])
def test_preset_builds_and_steps_abstractly(path, name, monkeypatch):
    config = load(path).get_config(name)
    assert set(config) == set(base())
    assert config.is_locked
    build('models', config.model, 'config.model')
    with config.unlocked():  # one block a stage, because tracing the real ones takes minutes
        config.init_from = ''  # there is no such run
        model = config.model.get('encoder', config.model)
        model.update(SHALLOW[model.name](len(model.get('blocks', (1, 1, 1, 1)))))
        if config.text:
            build('models', config.text, 'config.text', vocabulary=9, length=9)
            config.text.depth = 1
    monkeypatch.setattr(
        programs.data, 'open_splits', lambda data: {'train': Blank(), 'test': Blank()}
    )
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        parts = programs.open(config, None, mesh)
        program = parts
        before = jax.eval_shape(program.init)
        after, metrics = jax.eval_shape(program.step, before, program.batch)
        # Evaluators see images of one size, training views may have another.
        size = config.inputs.size
        images = {'image': jax.ShapeDtypeStruct((2, size, size, 3), np.float32)}
        features = jax.eval_shape(program.method.encode, before.params, before.extra, images)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert metrics['loss'].shape == ()
    assert parts.evaluators
    assert features['features'].shape[0] == 2


def test_views_may_be_smaller_than_what_evaluators_see():
    config = load(next(p for p in CONFIGS if p.stem == 'clip_vit')).get_config('flickr8k')
    assert config.inputs.size == 64
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        assert programs.build(config, mesh, 6000).batch['views'].shape == (128, 1, 48, 48, 3)
        with config.unlocked():
            config.model.update({'widths': (64,), 'blocks': (1,), 'pool': 'attention'})
        built = programs.build(config, mesh, 6000)
        with pytest.raises(
            UserError, match=r"config\.inputs: .*'views': \[1, 48, .*'image': \[64,"
        ):
            programs.check_step(built)
        with config.unlocked():
            config.inputs.view_size = -1
        with pytest.raises(UserError, match='view_size: got -1'):
            programs.build(config, mesh, 6000)


def test_clip_of_flickr8k_can_start_from_simclr_of_its_pictures():
    by_name = {p.stem: load(p) for p in CONFIGS}
    start = by_name['simclr_resnet'].get_config('flickr8k')
    for name in ('clip_vit', 'siglip_vit'):
        config = by_name[name].get_config('flickr8k')
        assert config.model == start.model
        assert config.data.source == start.data.source
        for key in ('mean', 'std'):
            assert config.inputs[key] == start.inputs[key], key


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_default_preset_is_the_embedded_data(path):
    source = load(path).get_config().data.source
    assert source in ('digits', 'digits:grids', 'digits:photographs')
    assert load(path).get_config(None) == load(path).get_config('digits')
