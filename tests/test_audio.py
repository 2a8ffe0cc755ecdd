"""Recordings as inputs: windows, the baseline, every evaluator, and a run of a method on them."""

import json
import logging
import pathlib
import pkgutil
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sounds
from models.ear import Ear
from scipy import signal

from contrastive_jax import data, evals, index, inference, models, parallel, train
from contrastive_jax import inputs as inputs_lib
from contrastive_jax.config import UserError, base, build
from contrastive_jax.data import BadRecord
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.evaluation import Measure
from contrastive_jax.evaluation.subject import Subject, Weights
from contrastive_jax.inputs import pipeline, waveform

ROOT = pathlib.Path(__file__).parents[1]
RATE, SECONDS, LENGTH = 8000, 0.5, 4000
SOURCE = 'recordings:{digit}_{speaker}_*'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('spoken')
    sounds.make_folder(root, count=8, folder='train')
    return sounds.make_folder(root, count=4, folder='test', seed=100)


@pytest.fixture
def splits(folder):
    return data.open_splits({'source': SOURCE, 'root': str(folder)})


@pytest.fixture
def one_device(monkeypatch):
    """What devices change is tested elsewhere; one compiles sooner."""
    make = parallel.make_mesh
    monkeypatch.setattr(parallel, 'make_mesh', lambda devices=None: make(jax.devices()[:1]))
    monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])


def make(views=1, **options):
    return waveform.make(**{'rate': RATE, 'seconds': SECONDS, 'views': views, **options})


def ramp(length, rate=RATE):
    """A record whose samples say where they stand, none of them 0."""
    return {'wave': np.arange(1, length + 1, dtype=np.int16), 'rate': rate}


# --- Windows --------------------------------------------------------------------------------------


def test_training_windows_are_cut_anywhere():
    transform = make(views=3).train
    assert transform.shapes == {'views': jax.ShapeDtypeStruct((3, LENGTH), jnp.int16)}
    rng = np.random.default_rng(0)
    starts = []
    for _ in range(300):
        row = transform.host(ramp(LENGTH + 9), rng)['views']
        assert row.shape == (3, LENGTH)
        assert row.dtype == np.int16
        starts += row[:, 0].tolist()
        np.testing.assert_array_equal(np.diff(row), 1)
    assert set(starts) == set(range(1, 11))  # both ends, and all between
    again = transform.host(ramp(20_000), np.random.default_rng(5))['views']
    np.testing.assert_array_equal(
        again, transform.host(ramp(20_000), np.random.default_rng(5))['views']
    )
    assert len(set(again[:, 0].tolist())) == 3


@pytest.mark.parametrize('length', [1, LENGTH - 3])
def test_short_recordings_are_whole_with_zeros_around_them(length):
    rng, befores = np.random.default_rng(0), set()
    for _ in range(100):
        (row,) = make().train.host(ramp(length), rng)['views']
        before = int(np.flatnonzero(row)[0])
        np.testing.assert_array_equal(row[before : before + length], ramp(length)['wave'])
        assert np.count_nonzero(row) == length
        befores.add(before)
    assert 0 <= min(befores) <= max(befores) <= LENGTH - length
    assert len(befores) > 90 if length == 1 else befores == {0, 1, 2, 3}


def test_evaluation_sees_the_middle():
    transform = make(views=2).eval
    assert transform.shapes == {'wave': jax.ShapeDtypeStruct((LENGTH,), jnp.int16)}
    for length, first in ((LENGTH, 1), (LENGTH + 10, 6), (LENGTH + 11, 6)):
        row = transform.host(ramp(length), None)['wave']
        np.testing.assert_array_equal(row, np.arange(first, first + LENGTH))
    row = transform.host(ramp(LENGTH - 10), None)['wave']
    assert np.flatnonzero(row)[[0, -1]].tolist() == [5, LENGTH - 6]
    floats = transform.device(None, {'wave': np.array([[-32768, 0, 16384]], np.int16), 'label': 3})
    assert floats['wave'].dtype == jnp.float32
    assert floats['wave'].tolist() == [[-1.0, 0.0, 0.5]]
    assert floats['label'] == 3


def test_tuning_sees_one_random_window():
    tune = make(views=4).tune
    assert tune.shapes['views'].shape == (1, LENGTH)
    assert tune.host(ramp(LENGTH + 5), np.random.default_rng(0))['views'].shape == (1, LENGTH)


@pytest.mark.parametrize('rate', [4000, 16_000, 11_025])
def test_other_rates_are_resampled(rate):
    def tone(rate):
        t = np.arange(rate) / rate
        return sounds.int16(0.5 * np.sin(2 * np.pi * 440 * t))

    row = make().eval.host({'wave': tone(rate), 'rate': rate}, None)['wave']
    expected = make().eval.host({'wave': tone(RATE), 'rate': RATE}, None)['wave']
    assert np.abs(row.astype(int) - expected).max() < 0.01 * 32768


def test_batches_do_not_depend_on_threads_or_processes(splits):
    def batches(threads, processes):
        parts = [
            pipeline.train_iterator(
                splits['train'],
                make(views=2).train,
                batch_size=16,
                seed=3,
                bad=BadRecords(None, 48),
                process_index=i,
                process_count=processes,
                threads=threads,
            )
            for i in range(processes)
        ]
        for _ in range(4):
            some = [next(part) for part in parts]
            yield {k: np.concatenate([batch[k] for batch in some]) for k in some[0]}

    for one, other in zip(batches(0, 1), batches(2, 2), strict=True):
        assert one.keys() == {'views', 'digit', 'speaker', 'index'}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_what_users_give(tmp_path):
    record = make().record
    path = tmp_path / 'a.wav'
    wave = sounds.int16(sounds.spoken('0', 'ann'))
    path.write_bytes(sounds.wav(wave, 16_000))
    for item, rate in ((path, 16_000), (str(path), 16_000), (wave, RATE), (wave / 32768, RATE)):
        found = record(item)
        np.testing.assert_array_equal(found['wave'], wave)
        assert found['rate'] == rate
    for item, why in (
        (tmp_path / 'gone.wav', 'unreadable: No such file'),
        (wave[None], r'got int16 \[1, \d+\], expected \[samples\]'),
        (wave.astype(np.int32), 'got int32'),
        (wave[:0], r'got int16 \[0\]'),
        (wave.astype(np.float32), 'got floats up to [0-9.]+, expected -1 to 1'),
        (np.array([0.1, np.nan]), 'not finite'),
    ):
        with pytest.raises(BadRecord, match=why):
            record(item)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'rate': 800}, r'inputs\.rate: got 800; expected a whole number of at least 1000'),
        ({'rate': 8000.5}, 'rate: got 8000.5'),
        ({'seconds': 0.05}, 'seconds: got 0.05; expected a number of at least 0.1'),
        ({'views': 0}, 'views: got 0; expected a whole number of at least 1'),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


# --- The baseline ---------------------------------------------------------------------------------


def reference(x_T, rate):
    """Log power in float64 by SciPy, of one window."""
    frame = round(0.032 * rate)
    hz, _, spectrum = signal.stft(
        x_T,
        rate,
        'hann',
        frame,
        frame - frame // 2,
        boundary=None,
        padded=False,
        scaling='spectrum',
    )
    power = np.abs(spectrum * signal.get_window('hann', frame).sum()) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + rate / 1400), 42)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bands = np.stack([
        np.interp(hz, edges[m : m + 3], [0, 1, 0]) @ power for m in range(40)
    ])  # fmt: skip
    heard = np.log1p(bands / (1e-5 * bands.max()))
    parts = np.array_split(np.arange(heard.shape[1]), 4)
    x = np.stack([heard[:, part].mean(1) for part in parts]).ravel()
    return x - x.mean()


@pytest.mark.parametrize(('rate', 'seconds'), [(8000, 0.5), (16_000, 1.0), (44_100, 0.3)])
def test_the_baseline_is_the_formula(rate, seconds):
    x = np.stack([sounds.spoken('1', 'eve', i, rate)[: int(0.19 * rate)] for i in range(3)])
    x = np.pad(x, ((0, 0), (0, round(rate * seconds) - x.shape[1]))).astype(np.float32)
    found = waveform.make(rate=rate, seconds=seconds).baseline({'wave': x})
    expected = np.stack([reference(row.astype(np.float64), rate) for row in x])
    assert found.shape == (3, 160)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_baseline_does_not_hear_how_loud_a_recording_is():
    inputs = make()
    x = np.pad(sounds.spoken('0', 'bob')[:LENGTH], (0, LENGTH))[None, :LENGTH].astype(np.float32)
    loud, soft, silence = (inputs.baseline({'wave': gain * x}) for gain in (1.0, 0.01, 0.0))
    np.testing.assert_allclose(loud, soft, atol=1e-3)
    assert jnp.abs(loud).max() > 1
    assert not jnp.any(silence)


def test_no_band_is_empty_at_low_rates():
    assert (waveform.bands(32, 1000).sum(0) >= 1).all()


def test_windows_are_drawn(splits):
    transform, rng = make(views=2), np.random.default_rng(0)
    rows = [transform.train.host(splits['train'][i], rng)['views'] for i in range(4)]
    png = transform.show(transform.train.device(None, {'views': np.stack(rows)}))
    assert png.startswith(b'\x89PNG')
    dark = transform.show({'views': np.zeros((4, 2, LENGTH), np.float32)})
    assert len(dark) < len(png)


# --- Evaluators -----------------------------------------------------------------------------------


def subject(splits, network):
    mesh, inputs = parallel.make_mesh(jax.devices()[:1]), make(views=1)
    if not network:
        return inference.baseline(inputs, splits, mesh, 16, BadRecords(None, 72))
    module: Any = Ear(6)
    params, stats = models.init(module, jax.random.key(0), inputs_lib.blank(inputs.eval)['wave'])

    @jax.jit
    def outputs(batch):
        features, named = models.apply(module, params, stats, batch['wave'], train=False)[0]
        return {'features': features, **named}

    def encode(batch, name, prepared=False):
        return outputs(batch if prepared else inputs.eval.device(None, batch))[name]

    return Subject(
        encode,
        inputs,
        splits,
        mesh,
        batch_size=16,
        outputs=lambda: ['features', 'block0'],
        weights=Weights(module, params, stats),
    )


FEW = {'per_class': (2,), 'draws': 1}
OPTIONS = {
    'knn': {**FEW, 'label': 'speaker', 'confusion': True},
    'linear': {**FEW, 'label': 'digit', 'strengths': (1.0,)},
    'clustering': {'label': 'digit'},
    'tsne': {'label': 'speaker'},
    'uniformity': {'label': 'speaker'},
    'finetune': {**FEW, 'label': 'digit', 'min_steps': 2, 'epochs': 1.0, 'learning_rates': (1e-3,)},
    'zeroshot': {'label': 'digit'},
}
NUMBERS = {
    'knn': {'top1', 'top1_2_per_class', 'top1_2_per_class_std'},
    'linear': {'top1', 'top1_2_per_class', 'top1_2_per_class_std'},
    'clustering': {'accuracy', 'nmi'},
    'collapse': {'std', 'rank'},
    'uniformity': {'uniformity', 'alignment', 'class_alignment'},
}
TUNED = {f'{s}top1_2_per_class{e}' for s in ('', 'scratch_') for e in ('', '_std')}
DRAWN = {'knn': {'confusion'}, 'tsne': {'map'}}
NOTHING = {
    **dict.fromkeys(
        ('attention', 'pca', 'neighbours', 'patches'), 'the inputs give no images but wave'
    ),
    **dict.fromkeys(('retrieval', 'zeroshot'), 'the encoder reads no text'),
}


@pytest.mark.parametrize('network', [False, True], ids=['baseline', 'network'])
@pytest.mark.parametrize('name', [m.name for m in pkgutil.iter_modules(evals.__path__)])
def test_every_evaluator_works_or_says_why_not(splits, name, network, caplog):
    evaluate = build('evals', {'name': name, **OPTIONS.get(name, {})}, f'config.evals.{name}')
    with caplog.at_level(logging.INFO, 'absl'):
        found = dict(evaluate(subject(splits, network)))
    numbers, drawn = NUMBERS.get(name, set()), DRAWN.get(name, set())
    if name == 'finetune' and network:
        numbers = TUNED
    assert {k for k, v in found.items() if isinstance(v, bytes)} == drawn
    assert found.keys() - drawn == numbers
    assert all(np.isfinite(found[k]) for k in numbers)
    if name in NOTHING:
        assert NOTHING[name] in caplog.text
    for measure in found.values():
        if isinstance(measure, Measure) and (label := OPTIONS.get(name, {}).get('label')):
            assert f'{name}, {label}' in measure.title


def test_labels_that_there_are_not_are_said(splits, caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        assert not dict(build('evals', {'name': 'knn'}, '')(subject(splits, False)))
    assert "the data has no label 'label'; there is 'digit', 'speaker'" in caplog.text


@pytest.mark.usefixtures('one_device')
def test_the_speech_preset(folder, tmp_path):
    config = runpy.run_path(str(ROOT / 'configs/eval.py'))['get_config']('speech')
    with config.unlocked():
        config.data.root, config.batch_size = str(folder), 16
        for spec in config.evals.values():
            if spec.name != 'tsne':
                spec.per_class = ()
    workdir = tmp_path / 'out'
    values = train.run(config, str(workdir), eval_only=True)
    entries = {f'{e}_{label}' for e in ('knn', 'linear') for label in ('digit', 'speaker')}
    assert values.keys() == {f'eval/{entry}/baseline_top1' for entry in entries}
    assert min(values.values()) > 0.9  # chance: a half, and a third
    table = json.loads((workdir / 'results.json').read_text())
    assert table.keys() == {e.replace('_', ', ') for e in entries}
    pictures = {p.name for p in (workdir / 'pictures/baseline').iterdir()}
    assert pictures == {'tsne_digit_map.png', 'tsne_speaker_map.png'}


# --- A run ----------------------------------------------------------------------------------------


@pytest.fixture
def ear(monkeypatch):
    """A model of recordings, which is a file in its package's folder."""
    path = [*models.__path__, str(pathlib.Path(__file__).parent / 'models')]
    monkeypatch.setattr(models, '__path__', path)


@pytest.mark.usefixtures('one_device', 'ear')
def test_a_method_of_views_is_trained_on_recordings_evaluated_and_loaded(folder, tmp_path):
    config = base()
    config.update({'total_steps': 6, 'batch_size': 16, 'checkpoint_every': 3})
    config.data.update({'source': SOURCE, 'root': str(folder)})
    config.inputs = {'name': 'waveform', 'rate': RATE, 'seconds': SECONDS, 'views': 2}
    config.model = {'name': 'ear', 'width': 8}
    config.method = {'name': 'simclr', 'temperature': 0.2, 'hidden': 16, 'projection': 8}
    config.optim = {'name': 'adamw', 'learning_rate': 1e-2}
    config.evals = {'knn': {'label': 'speaker', 'per_class': ()}, 'attention': {}, 'uniformity': {}}
    config.best = 'eval/knn/top1'
    workdir = str(tmp_path / 'run')
    values = train.run(config, workdir)
    assert {'eval/knn/top1', 'eval/uniformity/alignment'} <= values.keys()
    assert (tmp_path / 'run/inputs.png').read_bytes().startswith(b'\x89PNG')
    assert train.run(config, workdir, eval_only=True) == values

    encoder = inference.load(workdir, batch_size=4)
    paths = sorted((folder / 'test').iterdir())[:6]
    rows = encoder(paths)
    assert rows.shape == (6, 8)
    np.testing.assert_array_equal(rows, encoder([encoder.inputs.record(p)['wave'] for p in paths]))
    with pytest.raises(UserError, match=r'gone\.wav: unreadable'):
        encoder(['gone.wav'])
    with pytest.raises(UserError, match='an encoder of wave; only those of images'):
        inference.weights_of(workdir)
    with pytest.raises(UserError, match='wave'):
        index.of_images(encoder, str(folder), 'features', 0.01)
    # Images are not what this run's evaluators can be shown.
    other = config.copy_and_resolve_references()
    other.data.update({'source': 'digits', 'root': ''})
    with pytest.raises(
        UserError, match=r"'waveform' reads 'wave' and 'rate'.*'digits' gives 'image'"
    ):
        train.run(other, str(tmp_path / 'other'))
