"""What was trained, in use: the encoder of a workdir, indices of collections, search in them."""

import io
import pathlib
import runpy
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import environment
from pictures import encoded, photo, write
from PIL import Image

import contrastive_jax
from contrastive_jax import experiment, index, inference, parallel
from contrastive_jax.config import UserError
from contrastive_jax.evals import attention, pca
from contrastive_jax.index import About, Index
from contrastive_jax.workdir import checkpoint

ROOT = pathlib.Path(__file__).parents[1]


def started(workdir, name):
    """A run of a tiny encoder that has saved its first weights, as if they were those of step 2."""
    config = runpy.run_path(str(ROOT / f'configs/{name}.py'))['get_config']('digits')
    tiny = {'width': 16, 'depth': 1, 'heads': 2}
    with config.unlocked():
        config.update({'total_steps': 2, 'batch_size': 16})
        config.model.update({**tiny, 'patch': 4})
        config.method.projection = 8
        if config.text:
            config.text.update(tiny)
            config.update({'microbatch': 8, 'remat': True})
    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        parts = experiment.open(config, str(workdir), mesh)
        state = parts.init()
    checkpoint.claim(workdir, config.to_dict())
    if parts.inputs.tokenizer:
        parts.inputs.tokenizer.save(workdir)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
    checkpoints.save(state, None, 2)
    checkpoints.close()
    return workdir


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return started(tmp_path_factory.mktemp('clip'), 'clip_vit')


@pytest.fixture(scope='module')
def simclr(tmp_path_factory):
    return started(tmp_path_factory.mktemp('simclr'), 'simclr_vit')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """23 pictures of several sizes and kinds, at several depths."""
    root = tmp_path_factory.mktemp('photos')
    for i in range(23):
        kind = ('PNG', 'JPEG', 'WEBP')[i % 3]
        path = root / ('', 'a', 'a/b')[i % 3] / f'{i:02d}.{kind.lower()}'
        write(path, encoded(photo(i, 16 + i, 30 - i // 2), kind))
    write(root / 'notes.txt', b'no picture')
    return root


def start(module, *flags, devices=1):
    return subprocess.Popen(
        [sys.executable, '-m', f'contrastive_jax.{module}', *map(str, flags)],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert 'Traceback' not in err
    return out, err


def on_one_device(monkeypatch):
    monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])


def test_features_are_those_that_evaluators_see(clip, simclr):
    layers = ['features', 'block0', 'last4']
    for workdir, names in ((clip, ['embedding', *layers]), (simclr, layers)):
        parts, theirs = inference.open_run(str(workdir))
        source = parts.splits['test']
        images = np.stack([source[i]['image'] for i in range(100)])
        ours = contrastive_jax.load(workdir, batch_size=2)
        assert sorted(ours.outputs) == sorted(names)
        for name in names:
            expected = np.asarray(theirs.features('test', name).x_ND)[:100]
            assert np.array_equal(ours(images, name), expected), name
        assert ours.config.batch_size == 16
        assert ours.step == 2


def test_what_was_trained_can_be_drawn(simclr):
    _, encoder = inference.open_run(str(simclr))
    drawn = [pair for make in (attention.make, pca.make) for pair in make(count=3)(encoder)]
    assert [name for name, _ in drawn] == ['heads', 'patches']
    heads, patches = (Image.open(io.BytesIO(png)) for _, png in drawn)
    # Three rows of the image, two heads and their mean; three pairs of image and components.
    assert heads.size == (2 * 22 + 4 * 112 + 3 * 8 + 16, 22 + 22 + 3 * 120 - 8 + 22)
    assert patches.size[0] * patches.size[1] > 3 * 2 * 112**2


def test_texts_are_those_that_evaluators_see(clip):
    texts = ['a seven', 'top row three seven, bottom row one zero', 'été', '']
    _, theirs = inference.open_run(str(clip))
    found = contrastive_jax.load(clip, batch_size=2).texts(texts)
    assert np.array_equal(found, np.asarray(theirs.texts(texts))[:4])
    assert found.dtype == np.float32


def test_neither_batches_nor_devices_nor_the_form_matter(clip, photos, monkeypatch):
    paths = sorted(photos.rglob('*.*g')) + sorted(photos.rglob('*.webp'))
    encoder = contrastive_jax.load(clip, batch_size=2)
    rows = encoder(paths, 'embedding')
    assert rows.shape == (23, 8)
    some = [0, 7, 22]
    mixed = [paths[0], np.asarray(Image.open(paths[7]).convert('RGB')), str(paths[22])]
    assert np.array_equal(encoder(iter(mixed), 'embedding')[0], rows[0])
    assert np.allclose(encoder(mixed, 'embedding'), rows[some], atol=1e-6)
    assert np.allclose(contrastive_jax.load(clip)(paths, 'embedding'), rows, atol=1e-6)
    on_one_device(monkeypatch)
    alone = contrastive_jax.load(clip, batch_size=2)
    assert np.array_equal(alone(paths, 'embedding'), rows)
    assert np.array_equal(alone.texts(['a one'] * 5), encoder.texts(['a one'] * 5))
    assert encoder([]).shape == (0, 16)
    assert encoder.texts([]).shape == (0, 8)


def test_the_data_need_not_be_there(clip, tmp_path):
    """Nor what else the workdir held: config, tokenizer and checkpoint are enough."""
    for name in ('config.json', 'tokenizer.json', 'checkpoints'):
        copy = shutil.copytree if name == 'checkpoints' else shutil.copy
        copy(clip / name, tmp_path / name)
    path = tmp_path / 'config.json'
    path.write_text(path.read_text().replace('digits:grids', 'tfds:gone'))
    texts = ['a one']
    there = contrastive_jax.load(clip).texts(texts)
    assert np.array_equal(contrastive_jax.load(tmp_path).texts(texts), there)


def test_what_cannot_be_encoded_is_said_by_name(clip, simclr, tmp_path):
    encoder = contrastive_jax.load(simclr, batch_size=1)
    with pytest.raises(UserError, match=r"'simclr'.*'embedding'.*Exists: .*'features'"):
        encoder([], 'embedding')
    with pytest.raises(UserError, match=r"'simclr' reads no texts"):
        encoder.texts(['a'])
    write(tmp_path / 'cut.png', encoded(photo(), 'PNG')[:-40])
    for given, expected in (
        ([photo(), tmp_path / 'cut.png'], 'cut.png'),
        (['nowhere.jpg'], 'nowhere.jpg: No such file'),
        ([photo(), photo() / 255], r'items\[1\]: got float64'),
        (photo(), r'items\[0\]: got uint8 \[60, 3\], expected'),
        ('a.jpg', 'one path'),
    ):
        with pytest.raises(UserError, match=expected):
            encoder(given)
    with pytest.raises(UserError, match='one text'):
        contrastive_jax.load(clip).texts('a')
    with pytest.raises(UserError, match='batch_size: got 0'):
        contrastive_jax.load(clip, batch_size=0)
    with pytest.raises(UserError, match='no run in'):
        contrastive_jax.load(tmp_path)


def test_importing_the_package_is_instant():
    code = (
        'import sys, contrastive_jax\n'
        "assert not {'jax', 'numpy', 'absl'} & sys.modules.keys()\n"
        'from contrastive_jax import load\n'
        "assert 'jax' in sys.modules and callable(load)\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
    with pytest.raises(AttributeError, match='lod'):
        contrastive_jax.lod  # noqa: B018


def small_index(count=5, size=4, kind='images'):
    rows = index.unit(np.random.default_rng(0).normal(size=(count, size)).astype(np.float32))
    names = [f'ü/{i} 猫.png' for i in range(count)]
    return Index(rows, names, About('runs/a', 'f00', 7, kind, 'embedding', 'root'))


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
@pytest.mark.parametrize('kind', ['images', 'texts'])
def test_an_index_survives_its_file(suffix, kind, tmp_path):
    if suffix == 'parquet':
        pytest.importorskip('pyarrow')
    path, made = tmp_path / 'new' / f'a.{suffix}', small_index(kind=kind)
    index.write(made, str(path))
    found = index.read(str(path))
    assert found[1:] == made[1:]
    assert found.rows_ND.dtype == np.float32
    assert np.array_equal(found.rows_ND, made.rows_ND)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_index_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    index.write(small_index(), str(path))

    def full(file, **arrays):
        file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError, match='disk full'):
        index.write(small_index(3), str(path))
    assert len(index.read(str(path)).items) == 5
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


def test_what_is_no_index(tmp_path, monkeypatch):
    np.savez(tmp_path / 'other.npz', x=np.zeros(3))
    write(tmp_path / 'cut.npz', b'PK')
    for name, expected in (
        ('other.npz', 'no index of ours'),
        ('cut.npz', 'no index of ours'),
        ('gone.npz', 'does not exist'),
        ('a.npy', 'ends in .npz or .parquet'),
    ):
        with pytest.raises(UserError, match=expected):
            index.read(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match='pip install pyarrow'):
        index.write(small_index(), str(tmp_path / 'a.parquet'))


def test_nearest_is_what_sorting_by_cosine_gives():
    made = small_index(200, 6)
    made.rows_ND[100:] = made.rows_ND[:100]
    queries = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
    scores, rows = index.nearest(made, queries, 10)
    exact = queries.astype(float) @ made.rows_ND.T.astype(float)
    exact /= np.linalg.norm(queries.astype(float), axis=1, keepdims=True)
    assert np.allclose(scores, -np.sort(-exact, 1)[:, :10], atol=1e-6)
    assert np.array_equal(rows[:, ::2] + 100, rows[:, 1::2])  # of equal ones the first comes first
    assert index.nearest(made, queries, 999)[1].shape == (7, 200)


def test_unit_rows():
    rows = index.unit(np.array([[3, 4], [0, 0]], np.float32))
    assert np.allclose(rows, [[0.6, 0.8], [0, 0]])
    with pytest.raises(UserError, match='NaN'):
        index.unit(np.array([[np.nan]]))


def test_an_index_of_pictures(clip, photos):
    encoder = contrastive_jax.load(clip, batch_size=2)
    made = index.of_images(encoder, str(photos), 'embedding', 0.01)
    assert made.items == sorted(made.items)
    expected = index.unit(encoder([photos / path for path in made.items], 'embedding'))
    assert len(made.items) == 23
    assert np.array_equal(made.rows_ND, expected)
    assert made.about == About(str(clip), made.about.run, 2, 'images', 'embedding', str(photos))


def test_bad_pictures_are_left_out_and_too_many_stop_it(clip, photos, tmp_path):
    encoder = contrastive_jax.load(clip, batch_size=2)
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    write(tmp_path / 'a' / 'zero.png', b'')
    made = index.of_images(encoder, str(tmp_path), 'features', 0.05)
    whole = index.of_images(encoder, str(photos), 'features', 0.0)
    assert made.items == whole.items
    assert np.allclose(made.rows_ND, whole.rows_ND, atol=1e-6)
    with pytest.raises(UserError, match=r'zero\.png: zero bytes'):
        index.of_images(encoder, str(tmp_path), 'features', 0.01)
    write(tmp_path / 'alone' / 'x.jpg', b'\xff\xd8\xff')
    with pytest.raises(UserError, match='1 of 1 pictures'):
        index.of_images(encoder, str(tmp_path / 'alone'), 'features', 1.0)


def test_an_index_of_texts(clip, simclr, tmp_path):
    path = tmp_path / 'texts.txt'
    path.write_bytes('\ufeffa one\r\nzwölf\n'.encode())
    encoder = contrastive_jax.load(clip, batch_size=2)
    made = index.of_texts(encoder, str(path))
    assert made.items == ['a one', 'zwölf']
    assert np.array_equal(made.rows_ND, index.unit(encoder.texts(made.items)))
    for content, expected in (
        (b'a\n\nb\n  \n', r'line 2 \(and 1 others\) is empty'),
        (b'', 'is empty'),
        (b'\xff\xfe', 'not UTF-8'),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            index.of_texts(encoder, str(path))
    with pytest.raises(UserError, match='No such file'):
        index.of_texts(encoder, str(tmp_path / 'gone'))
    path.write_text('a')
    with pytest.raises(UserError, match='reads no texts'):
        index.of_texts(contrastive_jax.load(simclr), str(path))


def test_an_index_of_another_encoder_is_refused(clip, simclr, photos, tmp_path, caplog):
    encoder = contrastive_jax.load(clip)
    made = index.of_images(encoder, str(photos), 'embedding', 0.0)
    index.check(made, encoder)
    with pytest.raises(UserError, match=r'another run.*simclr.* has .*features 16'):
        index.check(made, contrastive_jax.load(simclr))
    with pytest.raises(UserError, match=r'\(7 dimensions\)'):
        index.check(made._replace(rows_ND=made.rows_ND[:, :7]), encoder)
    # What may change between two starts of a run makes no other run of it.
    config = checkpoint.read(clip)
    encoder.workdir = str(tmp_path)
    checkpoint.claim(tmp_path, {**config, 'log_every': 3})
    index.check(made, encoder)
    with caplog.at_level('WARNING'):
        index.check(made._replace(about=made.about._replace(step=1)), encoder)
    assert 'made at step 1' in caplog.text


def test_embed_and_search(clip, photos, tmp_path):
    """One process with three devices, two with two: the same bytes; then what is found in them."""
    out = tmp_path / 'one' / 'a.npz'
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    shared = (f'--workdir={clip}', f'--images={photos}', '--batch_size=3')
    one = start('embed', *shared, f'--out={out}', devices=3)
    several = [
        start(
            'embed',
            *(*shared, f'--out={tmp_path / "b.npz"}', f'--coordinator=localhost:{port}'),
            *('--processes=2', f'--process={i}'),
            devices=2,
        )
        for i in range(2)
    ]
    assert 'embedding of step 2, 23 x 8' in finish(one)[1]
    for process in several:
        finish(process)
    assert out.read_bytes() == (tmp_path / 'b.npz').read_bytes()
    made = index.read(str(out))
    assert made.about.name == 'embedding'

    query, sheet = photos / 'a' / '01.jpeg', tmp_path / 'sheets' / 'sheet.png'
    flags = (f'--workdir={clip}', f'--index={out}', '--k=3', f'--out={sheet}')
    said, _ = finish(start('search', *flags, 'a one', f'--image={query}'))
    lines = said.splitlines()
    assert lines[0] == 'a one'
    encoder = contrastive_jax.load(clip)
    expected = np.argsort(-(made.rows_ND @ encoder.texts(['a one'])[0]))[:3]
    assert [line.split()[2] for line in lines[1:4]] == [made.items[i] for i in expected]
    assert lines[4] == str(query)
    assert lines[5].split() == ['1', '1.000', 'a/01.jpeg']
    with Image.open(sheet) as drawn:
        assert drawn.format == 'PNG'
        assert len(drawn.convert('RGB').getcolors(2**20)) > 100


@pytest.mark.parametrize(
    ('module', 'flags', 'expected'),
    [
        ('embed', ['--workdir=w', '--out=a.npz'], ['--images=DIR', '--texts=FILE']),
        ('embed', ['--workdir=w', '--images=d'], ['--out is required', 'contrastive_jax.embed']),
        ('embed', ['--workdir=w', '--images=d', '--out=a.csv'], ['.npz', '.parquet']),
        ('embed', ['--workdir=w', '--texts=d', '--out=a.npz', '--what=features'], ["'embedding'"]),
        ('embed', ['--workdir=w', '--images=d', '--out=a.npz', 'stray'], ['stray']),
        ('search', ['--workdir=w', '--index=gone.npz'], ['expected a query']),
        ('search', ['--workdir=w', '--index=gone.npz', 'no.jpg'], ["'no.jpg' does not exist"]),
        ('search', ['--workdir=w', '--index=gone.npz', 'a'], ["'gone.npz' does not exist"]),
        ('search', ['--workdir=w', '--index=gone.npz', 'a', '--k=0'], ['--k=0']),
        ('search', ['--workdir=w', '--index=gone.npz', 'a', '--out=a.jpg'], ["'a.jpg'", '.png']),
    ],
)
def test_mistakes_on_the_command_line(module, flags, expected):
    _, err = finish(start(module, *flags), code=2)
    assert err.startswith('error: ')
    assert err.count('\n') == 1, err
    for text in expected:
        assert text in err
