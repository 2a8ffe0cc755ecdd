"""Evaluators for a finished run: configs/eval.py, end to end on a tiny run of the digits."""

import json
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from pictures import encoded, photo, write
from test_train import finish, start

from contrastive_jax import experiment, parallel, train
from contrastive_jax.config import UserError, images
from contrastive_jax.workdir import checkpoint, records, runs

ROOT = pathlib.Path(__file__).parents[1]
TEXT = {'tokenizer': '', 'vocabulary': 300, 'length': 8, 'lower': True}
KNN = {'k': 20, 'temperature': 0.07, 'per_class': ()}


def recipe(name, arg=None):
    return runpy.run_path(str(ROOT / f'configs/{name}.py'))['get_config'](arg)


def suite(**evals):
    config = recipe('eval')
    with config.unlocked():
        config.evals = evals
    return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that has saved its first weights as if they were those of step 2."""
    workdir = tmp_path_factory.mktemp('run')
    config = recipe('simclr_vit')
    with config.unlocked():
        config.update({'total_steps': 2, 'batch_size': 128})
        config.model.update({'width': 16, 'depth': 2, 'heads': 2})
        config.method.update({'hidden': 16, 'projection': 8})
        config.inputs.augment, config.evals = {}, {'knn': KNN}
    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = experiment.open(config, str(workdir), mesh).init()
    checkpoint.claim(workdir, config.to_dict())
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
    checkpoints.save(state, None, 2)
    checkpoints.close()
    return workdir


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """What devices change is tested elsewhere; one compiles sooner."""
    make = parallel.make_mesh
    monkeypatch.setattr(parallel, 'make_mesh', lambda devices=None: make(jax.devices()[:1]))


def of_step(workdir, step):
    """The last value of every metric of a step."""
    found = {}
    for record in records.read(workdir):
        if record['step'] == step:
            found |= {k: v for k, v in record.items() if k.startswith('eval/')}
    return found


def test_a_run_is_evaluated_with_other_evaluators_and_their_baselines(run):
    config = (run / 'config.json').read_bytes()
    weights = checkpoint.weights(run, 2)
    linear = {'strengths': (1.0,), 'tolerance': 1e-3, 'outputs': ('block*',), 'per_class': ()}
    tune = {'per_class': (1,), 'draws': 1, 'min_steps': 1, 'epochs': 0.1, 'layer_decay': 1.0}
    knn = {'per_class': (), 'fractions': (0.1,), 'draws': 1}
    given = suite(knn=knn, linear=linear, finetune=tune | {'learning_rates': (1e-3,)})
    values = train.run(given, str(run), eval_only=True)
    assert values == of_step(run, 2)
    assert {k for k in values if k.startswith('eval/linear')} == {
        *('eval/linear/block0_top1', 'eval/linear/block1_top1')
    }
    # The untrained encoder is what the run started from, and that is what it has saved here.
    start = of_step(run, 0)
    # Fine-tuned, it would be the network from scratch, which is there already.
    tuned = {f'eval/finetune/top1_1_per_class{s}' for s in ('', '_std')}
    assert {k: start.get(k) for k in values} == values | dict.fromkeys(tuned)
    assert 'eval/knn/baseline_top1_10_percent' in start
    table = json.loads((run / 'results.json').read_text())
    assert all(v > 0.1 for v in table['knn, 10 % of labels'].values())
    for row in ('linear, block1', 'finetune, scratch, 1 labels per class'):
        assert table[row]['baseline'] is None
        assert table[row]['untrained'] is not None
    # Nothing but the records has changed.
    assert (run / 'config.json').read_bytes() == config
    for old, new in zip(weights, checkpoint.weights(run, 2), strict=True):
        jax.tree.map(np.testing.assert_array_equal, old, new)


def test_what_the_run_has_found_is_not_evaluated_again(run, monkeypatch):
    writer = records.Writer(str(run))
    records.describe(str(run), {'knn/top1': ('knn, all labels', '%')})
    writer.write(0, {'eval/knn/top1': 0.1234, 'eval/knn/baseline_top1': 0.5})
    calls = []

    def evaluate(given, folder, state):
        calls.append((state is None, sorted(given.evaluators)))
        return {'eval/knn/top1': 0.75}

    monkeypatch.setattr(train, '_evaluate', evaluate)
    train.run(suite(knn=KNN), str(run), eval_only=True)
    assert calls == [(False, ['knn'])]
    table = json.loads((run / 'results.json').read_text())
    assert table['knn, all labels'] == {'baseline': 0.5, 'untrained': 0.1234, 'trained': 0.75}
    train.run(suite(knn=KNN, collapse={}), str(run), eval_only=True)
    assert calls[1:] == [(False, ['collapse', 'knn']), (True, ['collapse']), (False, ['collapse'])]
    train.run(suite(knn={**KNN, 'k': 3}), str(run), eval_only=True)
    assert calls[4:] == [(False, ['knn']), (True, ['knn']), (False, ['knn'])]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'my photos'
    for split, count in (('train', 7), ('test', 3)):
        for i in range(2 * count):
            path = root / split / ('cat', 'dog')[i % 2] / f'{i}.png'
            write(path, encoded(photo(i, 20, 24), 'PNG'))
    write(root / 'train' / 'cat' / 'bad.png', b'')
    return root


def test_another_data_set_has_records_of_its_own(run, photos):
    before = (run / 'metrics.jsonl').read_bytes()
    config = suite(knn={'k': 3, 'per_class': ()})
    with config.unlocked():
        config.data.update({'source': 'folder', 'root': str(photos), 'max_bad': 0.1})
    values = train.run(config, str(run), eval_only=True)
    assert 0 <= values['eval/knn/top1'] <= 1
    assert (run / 'metrics.jsonl').read_bytes() == before
    folder = run / 'on_folder_my_photos'
    assert of_step(folder, 2) == values
    assert of_step(folder, 0).keys() == {'eval/knn/top1', 'eval/knn/baseline_top1'}
    assert json.loads((folder / 'results.json').read_text()).keys() == {'knn'}
    assert not (run / 'bad_records.jsonl').exists()


def test_a_baseline_needs_no_run(run, photos, tmp_path, capsys):
    config = suite(knn=KNN, knn_3={'name': 'knn', 'k': 3, 'per_class': (), 'label': 'label'})
    with config.unlocked():
        config.data.update({'source': 'folder', 'root': str(photos), 'max_bad': 0.1})
        config.inputs = {**images(), 'size': 16, 'crop_fraction': 1.0}
        config.batch_size = 8
    workdir = tmp_path / 'new'
    values = train.run(config, str(workdir), eval_only=True)
    assert values.keys() == {'eval/knn/baseline_top1', 'eval/knn_3/baseline_top1'}
    assert of_step(workdir, 0) == values
    # Two of one evaluator have a row each, and columns without a number are not printed.
    assert json.loads((workdir / 'results.json').read_text()) == {
        title: {'baseline': value, 'untrained': None, 'trained': None}
        for title, value in zip(('knn', 'knn, knn_3'), values.values(), strict=True)
    }
    printed = capsys.readouterr().out
    assert re.search(r'^ +baseline$', printed, re.MULTILINE)
    bad = [json.loads(line) for line in (workdir / 'bad_records.jsonl').read_text().splitlines()]
    assert [entry['record'] for entry in bad] == ['train/cat/bad.png']
    # The same again is the same again; a run's records are not for it to overwrite.
    assert train.run(config, str(workdir), eval_only=True) == values
    with pytest.raises(UserError, match=r'config\.batch_size: got 8, but this is for the run in'):
        train.run(config, str(run), eval_only=True)
    with config.unlocked():
        config.data.update({'source': 'digits', 'root': ''})
        config.inputs = {**images(), 'name': 'captions', 'text': TEXT}
    with pytest.raises(UserError, match=r"'captions' reads 'captions' of a record"):
        train.run(config, str(tmp_path / 'other'), eval_only=True)


def test_mistakes(run, tmp_path):
    config = suite(knn={})
    with pytest.raises(UserError, match='no run in'):
        train.run(config, str(tmp_path / 'nothing'), eval_only=True)
    with pytest.raises(UserError, match=r'config\.method: not set.*--eval_only'):
        train.run(config, str(run))
    for key, value in (('seed', 3), ('inputs.size', 32), ('method.name', 'simclr')):
        wrong = suite(knn={})
        with wrong.unlocked():
            wrong.update_from_flattened_dict({key: value})
        if key == 'method.name':
            with pytest.raises(UserError, match='another config'):
                train.run(wrong, str(run), eval_only=True)
            continue
        with pytest.raises(UserError, match=rf'config\.{key}: got {value}.*for the run in'):
            train.run(wrong, str(run), eval_only=True)
    with pytest.raises(UserError, match=r'config\.evals\.linear: unknown key'):
        train.run(suite(linear={'output': ('cls',)}), str(run), eval_only=True)
    with pytest.raises(
        UserError, match=r"outputs: unknown .*'cls'.*'block0', 'block1', 'features'"
    ):
        train.run(suite(linear={'outputs': ('cls',)}), str(run), eval_only=True)
    assert not (tmp_path / 'nothing').exists()


@pytest.mark.parametrize('preset', ['quick', 'labels', 'layers', 'full'])
def test_presets_build_for_a_run(run, preset):
    config = recipe('eval', preset)
    assert config.is_locked
    found = runs.resolve(config, str(run), eval_only=True)
    assert found.method.name == 'simclr'
    assert found.batch_size == 128
    assert found.evals == config.evals
    assert runs.other_data(found, str(run)) == ''
    parts = experiment.open(found, str(run), parallel.make_mesh())
    assert list(parts.evaluators) == sorted(config.evals)
    assert f'`:{preset}`' in (ROOT / 'configs/eval.py').read_text()


def test_on_the_command_line(tmp_path):
    config = ['--config=configs/eval.py:labels']
    out = finish(start(tmp_path / 'run', '--eval_only', tiny=config), code=2)
    assert 'no run in' in out
    assert 'Traceback' not in out
    assert not (tmp_path / 'run').exists()
