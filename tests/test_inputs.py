"""The one door for data: rows, batches and floats have the shapes that inputs say."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import config as config_lib
from contrastive_jax import experiment, parallel, train
from contrastive_jax import inputs as inputs_lib
from contrastive_jax.config import UserError
from contrastive_jax.data import Subset
from contrastive_jax.inputs import pipeline

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))
TRAINED = [path for path in CONFIGS if path.stem not in ('eval', 'simclr_resnet')]


def recipe(path, preset='digits'):
    return runpy.run_path(str(path))['get_config'](preset)


def simclr():
    return recipe(pathlib.Path(__file__).parents[1] / 'configs/simclr_vit.py')


@pytest.mark.parametrize('path', TRAINED, ids=lambda p: p.stem)
def test_a_presets_own_batches_are_as_its_inputs_say(path, monkeypatch):
    """Of its own source: training, evaluation and fine-tuning, on the host and on the device."""
    config = recipe(path)
    with config.unlocked():
        config.init_from = ''  # there is no such run
    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = experiment.open(config, None, mesh)
    inputs, source = found.inputs, found.splits['train']
    batch = next(
        pipeline.train_iterator(
            source, inputs.train, batch_size=config.batch_size, seed=0, bad=found.bad
        )
    )
    shapes = {name: (x.shape, x.dtype) for name, x in batch.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in found.batch.items()}
    # The step is traced for what it will be given.
    floats = jax.eval_shape(inputs.train.device, jax.random.key(0), found.batch)
    for name, x in inputs_lib.blank(inputs.train, source.classes).items():
        assert (floats[name].shape[1:], floats[name].dtype) == (x.shape[1:], x.dtype), name
    few = Subset(found.splits['test'], range(5))
    (batch,) = pipeline.eval_batches(few, inputs.eval, batch_size=8, bad=found.bad)
    assert batch.keys() == {*inputs.eval.shapes, *source.classes, 'mask'}
    given = inputs.eval.device(None, {k: jnp.asarray(batch[k]) for k in inputs.eval.shapes})
    assert all(x.dtype == jnp.float32 for x in given.values())
    assert inputs.baseline(given).ndim == 2
    row = inputs.tune.host(source[0], np.random.default_rng(0))
    for name, shape in inputs.tune.shapes.items():
        assert (row[name].shape, row[name].dtype) == (shape.shape, shape.dtype)
    assert inputs.show is not None
    some = {k: jnp.zeros(x.shape, x.dtype) for k, x in found.batch.items()}
    png = inputs.show(inputs.train.device(jax.random.key(0), {k: v[:2] for k, v in some.items()}))
    assert png.startswith(b'\x89PNG')


def test_what_a_method_reads_and_inputs_do_not_give_is_named():
    config = recipe(pathlib.Path(__file__).parents[1] / 'configs/sup_con.py')
    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        built = experiment.build(config, mesh, 1000, labels=())
        message = r"config\.method: 'sup_con' reads 'label' of a batch, which the inputs 'images'"
        with pytest.raises(UserError, match=message + r" do not give; they give 'views', 'index'"):
            experiment.check_step(built)


def test_what_inputs_read_and_a_source_does_not_give_is_named(tmp_path):
    config = recipe(pathlib.Path(__file__).parents[1] / 'configs/clip_vit.py')
    with config.unlocked():
        config.data.source = 'digits'
    message = r"config\.inputs: 'captions' reads 'captions' of a record; the source 'digits' gives"
    with pytest.raises(UserError, match=message):
        train.run(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_keys_of_before_are_named_with_their_new_places(tmp_path):
    config = simclr()
    with config.unlocked():
        config.data.image_size = 32
    with pytest.raises(UserError, match=r'config\.data\.image_size: is config\.inputs\.size now'):
        train.run(config, str(tmp_path))
    config = simclr()
    with config.unlocked():
        config.augment = {}
    with pytest.raises(UserError, match=r'config\.augment: is config\.inputs\.augment now'):
        train.run(config, str(tmp_path))


def test_a_config_of_before_is_today_s():
    before = {
        'augment': {'jitter': {'prob': 1.0}},
        'data': {'source': 'captions', 'image_size': 64, 'views': 1, 'text': {'length': 9}},
        'seed': 3,
    }
    found = config_lib.updated(before)
    assert found['data'] == {'source': 'captions'}
    assert (found['inputs']['name'], found['inputs']['size'], found['seed']) == ('captions', 64, 3)
    assert found['inputs']['text'] == {'length': 9}
    assert found['inputs']['augment'] == {'jitter': {'prob': 1.0}}
    # Keys that it is older than have the effect of their defaults.
    assert found['inputs']['local_views'] == 0
    assert config_lib.updated(found) == found
    assert config_lib.updated({'data': {'text': {}}})['inputs']['name'] == 'images'
    assert before['data']['image_size'] == 64
