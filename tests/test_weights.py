"""Encoders in files: read and written without anybody's library but safetensors."""

import json
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from pictures import photo
from safetensors.numpy import load_file, save_file
from test_using import ROOT, finish, start, started

import contrastive_jax
from contrastive_jax import config as config_lib
from contrastive_jax import experiment, index, inference, models, parallel, weights
from contrastive_jax.config import UserError
from contrastive_jax.weights import families, initial, names, positions, targets


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return started(tmp_path_factory.mktemp('clip'), 'clip_vit')


@pytest.fixture(scope='module')
def simclr(tmp_path_factory):
    return started(tmp_path_factory.mktemp('simclr'), 'simclr_vit')


def encoder_of(spec, size=16, **inputs):
    """Random weights, every one of them off its initial value."""
    config = config_lib.base()
    config.model = spec
    config.inputs = config_lib.images()
    config.inputs.update({'size': size, **inputs})
    module = config_lib.build('models', spec, 'model')
    x = np.zeros((1, size, size, 3), np.float32)
    trees = jax.eval_shape(lambda key: models.init(module, key, x), jax.random.key(0))
    rng = np.random.default_rng(0)

    def start(path, leaf):
        noise = 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + np.abs(noise) if path[-1].key in ('var', 'scale') else noise

    trees = jax.tree_util.tree_map_with_path(start, trees)
    return weights.Weights(config, {'image': trees}, 'here')


def written(found, folder):
    for name, content in found.items():
        weights.files.write(targets.content(content), folder / name)
    return folder / 'model.safetensors'


def features(path, images, name='features', **options):
    return contrastive_jax.load(path, batch_size=2, **options)(images, name)


def encoded_by(found, name, **batch):
    encode, state = weights.encoder(found)
    return np.asarray(jax.jit(encode)(*state, batch)[name])


def images_of(size=16, count=2):
    return np.stack([photo(i, size, size) for i in range(count)])


VIT = {'name': 'vit', 'width': 16, 'depth': 2, 'heads': 2, 'patch': 4}
RESNET = {'name': 'resnet', 'widths': (64, 8, 8, 8), 'blocks': (1, 2, 1, 1)}
ENCODERS = {
    'cls': VIT,
    'mean': {**VIT, 'pool': 'mean', 'activation': 'gelu'},
    'mean with cls': {**VIT, 'pool': 'mean', 'cls_token': True, 'position': 'learned'},
    'registers': {**VIT, 'registers': 3, 'layer_scale': 0.1, 'position': 'learned'},
    'clip': {**VIT, 'norm_pre': True, 'activation': 'quick_gelu', 'epsilon': 1e-5},
    'map': {**VIT, 'pool': 'map', 'activation': 'quick_gelu'},
    'frozen': {**VIT, 'freeze_patch_embedding': True, 'patch_bias': False},
    'basic': RESNET,
    'bottleneck': {**RESNET, 'block': 'bottleneck'},
}


@pytest.mark.parametrize('target', ['timm', 'transformers'])
@pytest.mark.parametrize('name', ENCODERS)
def test_what_is_written_for_others_is_read_back(name, target, tmp_path):
    spec = ENCODERS[name]
    size = 32 if spec['name'] == 'resnet' else 16
    found = encoder_of(spec, size, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    found.config.inputs.crop.interpolation = 'bilinear'
    images = images_of(size)
    x = (images / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.4, 0.3])
    expected = encoded_by(found, 'features', image=x.astype(np.float32))
    path = written(getattr(targets, target)(found), tmp_path)
    pool = {'pool': spec['pool']} if name == 'mean with cls' else {}
    encoder = contrastive_jax.load(path, batch_size=2, model=pool)
    ours = encoder(images)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert encoder.config.inputs.crop.interpolation == 'bilinear'
    assert encoder.config.inputs.size == size


@pytest.mark.parametrize(
    ('target', 'spec', 'expected'),
    [
        ('timm', {**VIT, 'pool': 'cls_mean'}, "unknown pool 'cls_mean'"),
        ('timm', {**VIT, 'epsilon': 1e-3}, 'got epsilon 0.001'),
        ('timm', {**RESNET, 'stem': 'cifar'}, "stem='cifar'"),
        ('timm', {**RESNET, 'widths': (8, 8, 8, 8)}, r'got widths \[8, 8, 8, 8\]'),
        ('transformers', {**RESNET, 'pool': 'attention'}, "pool='attention'"),
        ('transformers', {**VIT, 'pool': 'mean', 'norm_pre': True}, 'without a CLS token'),
        ('transformers', {**VIT, 'layer_scale': 1e-5, 'norm_pre': True}, "CLIP's"),
        ('transformers', {**VIT, 'pool': 'map', 'cls_token': True}, "pool='map'"),
    ],
)
def test_what_others_cannot_say(target, spec, expected):
    with pytest.raises(UserError, match=expected):
        getattr(targets, target)(encoder_of(spec, 32))


def test_a_run_in_one_file_has_the_same_bits(clip, simclr, tmp_path):
    images, words = images_of(), ['a one', 'three and seven above one and zero']
    for workdir, outputs in ((clip, ['features', 'embedding']), (simclr, ['features'])):
        out = tmp_path / f'{workdir.name}.safetensors'
        weights.files.write(weights.content(inference.weights_of(workdir)), out)
        run = contrastive_jax.load(workdir, batch_size=2)
        file = contrastive_jax.load(out, batch_size=2)
        assert file.outputs == run.outputs
        for name in outputs:
            assert np.array_equal(file(images, name), run(images, name))
        again = weights.content(weights.read(out))
        assert again == out.read_bytes()
        if 'embedding' in outputs:
            assert np.array_equal(file.texts(words), run.texts(words))
            made = index.of_images(file, str(written_pictures(tmp_path)), 'embedding', 0.0)
            index.check(made, file)
            with pytest.raises(UserError, match='another run'):
                index.check(made, run)
        else:
            with pytest.raises(UserError, match='the encoder reads no texts'):
                file.texts(words)


def written_pictures(folder):
    from pictures import encoded, write

    write(folder / 'photos' / 'a.png', encoded(photo(0), 'PNG'))
    return folder / 'photos'


def test_clip_for_transformers_keeps_what_scales_its_similarity(clip, tmp_path):
    """An image tower with a LayerNorm in front is CLIP's; the grids' own is none and goes alone."""
    found = inference.weights_of(clip)
    alone = targets.transformers(found)
    assert alone['config.json']['model_type'] == 'siglip_vision_model'
    image = encoder_of({**VIT, 'norm_pre': True, 'epsilon': 1e-5})
    config = found.config.copy_and_resolve_references()
    with config.unlocked():
        config.model = image.config.model
    both = found._replace(config=config, encoders=found.encoders | image.encoders)
    path = written(targets.transformers(both), tmp_path)
    arrays = load_file(path)
    assert arrays['logit_scale'] == found.encoders['similarity'][0]['logit_scale']
    again = weights.read(path, model={'activation': 'gelu_tanh'})
    ids = np.array([[3, 4, 5, -1], [7, 8, -1, -1]], np.int32)
    ours, theirs = (encoded_by(x, 'embedding', text=ids) for x in (both, again))
    assert np.abs(ours - theirs).max() < 1e-5
    assert weights.tokenizer(again)(['a one'])[0, :4].tolist() == (
        weights.tokenizer(found)(['a one'])[0, :4].tolist()
    )


def timm_file(folder, change=lambda arrays: arrays, suffix='safetensors'):
    spec = {**VIT, 'width': 64, 'heads': 1, 'activation': 'gelu', 'position': 'learned'}
    arrays = dict(targets.timm(encoder_of(spec))['model.safetensors'])
    arrays = {k: np.ascontiguousarray(v) for k, v in change(arrays).items()}
    path = folder / f'vit.{suffix}'
    np.savez(path, **arrays) if suffix == 'npz' else save_file(arrays, path)
    return path


def test_prefixes_and_what_is_no_part_of_an_encoder(tmp_path, caplog):
    expected = features(timm_file(tmp_path), images_of())

    def moco(arrays):
        other = {f'module.momentum_encoder.{k}': v + 1 for k, v in arrays.items()}
        more = {'module.base_encoder.head.0.weight': np.zeros((3, 64), np.float32)}
        return {f'module.base_encoder.{k}': v for k, v in arrays.items()} | other | more

    with caplog.at_level('INFO'):
        found = features(timm_file(tmp_path, moco), images_of())
    assert np.array_equal(found, expected)
    assert '31 that are no part' in caplog.text
    assert 'as is usual for its kind' in caplog.text
    assert np.array_equal(features(timm_file(tmp_path, suffix='npz'), images_of()), expected)


def test_mistakes_in_files_are_listed(tmp_path):
    def broken(arrays):
        arrays.pop('norm.weight')
        arrays.pop('blocks.1.mlp.fc1.bias')
        arrays['norm.bias'] = arrays['norm.bias'][:-1]
        return arrays | {f'extra{i}': np.zeros(1, np.float32) for i in range(7)}

    with pytest.raises(UserError) as error:
        weights.read(timm_file(tmp_path, broken))
    for expected in (
        'missing: blocks.1.mlp.fc1.bias, norm.weight',
        'unexpected: extra0, extra1, extra2, extra3, extra4, ... (7 in all)',
        'of another shape: norm.bias [63] for norm/bias [64]',
    ):
        assert expected in str(error.value)

    def twice(arrays):
        return {f'{p}.{k}': v for p in 'ab' for k, v in arrays.items()}

    def narrow(arrays):
        return dict(targets.timm(encoder_of(VIT))['model.safetensors'])

    def stranger(arrays):
        return {'x.weight': np.zeros(2, np.float32)}

    def grid(arrays):
        return arrays | {'pos_embed': arrays['pos_embed'][:, :-2]}

    for change, expected in (
        (twice, r"several encoders, \['a\.', 'b\.'\]"),
        (narrow, 'width of 16 does not say how many heads'),
        (stranger, 'names of no encoder that is known: x.weight'),
        (grid, 'of no square grid'),
    ):
        with pytest.raises(UserError, match=expected):
            weights.read(timm_file(tmp_path, change))
    with pytest.raises(UserError, match='multiple of patch=4'):
        weights.read(timm_file(tmp_path), image_size=18)
    assert weights.read(timm_file(tmp_path), image_size=24).config.inputs.size == 24


def test_no_pickle_is_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, ('raise SystemExit("opened")',)

    np.savez(tmp_path / 'a.npz', x=np.array([Bomb()], dtype=object))
    (tmp_path / 'a.pth').write_bytes(b'\x80')
    (tmp_path / 'cut.safetensors').write_bytes(b'\x00' * 12)
    for name, expected in (
        ('a.pth', 'Convert it .*safetensors.torch'),
        ('gone.bin', 'a pickle can run any code'),
        ('a.npz', 'cannot be read'),
        ('cut.safetensors', 'cannot be read as .safetensors'),
        ('gone.safetensors', 'no such file'),
    ):
        with pytest.raises(UserError, match=expected):
            contrastive_jax.load(tmp_path / name)
    with pytest.raises(UserError, match='are for files of weights'):
        contrastive_jax.load(tmp_path, image_size=4)


def test_every_family_is_told_by_its_own_marker():
    """A file of one family must not be taken for one that is asked for first."""
    for family in families.FAMILIES:
        places = [{'s': 1, 'z': 0, 'i': 0}]
        table = names.expand(family.image, places)
        shapes = {}
        for path in table:
            for leaf in ('', '/kernel', '/scale', '/bias'):
                found = names.find(table, path + leaf)
                if found and not (leaf == '/bias' and family.name.startswith('CLIP')):
                    shapes |= {name: (1,) for name in names.names_of(found[0])}
        assert families.detect('a', shapes)[0] is family


def test_positions_of_registers_and_without_cls():
    rng = np.random.default_rng(0)
    table, registers = rng.normal(size=(12, 4)), rng.normal(size=(2, 4))
    for rows, before in ((12, 3), (10, 1), (9, 0)):
        assert positions.split('a', table[:rows], 1, 2) == (before, 3)
        new, found = positions.adapt(
            table[:rows], registers, cls=1, before=before, side=3, antialias=False
        )
        assert np.array_equal(new[1:], table[before:rows])
        assert np.array_equal(new[0], table[0] if before else np.zeros(4))
        assert np.array_equal(found, registers + table[1:3] if before == 3 else registers)


ALONE = """
import json, sys
sys.modules['contrastive_jax'] = None
import jax, numpy as np
path = sys.argv[1]
about = json.loads(open(path + '.json').read())
assert about['platforms'] == ['cpu', 'cuda', 'tpu']
program = jax.export.deserialize(bytearray(open(path, 'rb').read()))
images = np.load(sys.argv[2])
out = {f'{k}{n}': v for n in (1, 3) for k, v in program.call(images[:n]).items()}
np.savez(sys.argv[3], **out)
"""


@pytest.mark.parametrize('pixels', ['uint8', pytest.param('float32', marks=pytest.mark.slow)])
def test_stablehlo_runs_without_this_package(clip, tmp_path, pixels):
    pytest.importorskip('flatbuffers')
    out = tmp_path / 'clip.stablehlo'
    flags = ('--format=stablehlo', f'--pixels={pixels}')
    finish(start('export', f'--workdir={clip}', f'--out={out}', *flags))
    images = images_of(16, 3)
    given = images if pixels == 'uint8' else (images / 255).astype(np.float32)
    np.save(tmp_path / 'images.npy', given)
    command = [sys.executable, '-c', ALONE, out, tmp_path / 'images.npy', tmp_path / 'out.npz']
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, timeout=120)
    found = np.load(tmp_path / 'out.npz')
    for name in ('features', 'embedding'):
        expected = contrastive_jax.load(clip, batch_size=2)(images, name)
        for n in (1, 3):
            assert np.abs(found[f'{name}{n}'] - expected[:n]).max() < 1e-5


def test_the_command(simclr, tmp_path):
    out = tmp_path / 'new' / 'a.safetensors'
    finish(start('export', f'--workdir={simclr}', f'--out={out}'))
    assert sorted(p.name for p in out.parent.iterdir()) == ['a.json', 'a.safetensors']
    expected = features(simclr, images_of())
    assert np.array_equal(features(out, images_of()), expected)
    finish(start('export', f'--workdir={out}', f'--out={tmp_path / "t"}', '--format=transformers'))
    config = json.loads((tmp_path / 't' / 'config.json').read_text())
    assert config['contrastive_jax']['features'] == 'last_hidden_state.mean(1)'
    for flags, expected in (
        ([f'--out={tmp_path}', '--format=onnx'], "unknown format 'onnx'"),
        ([f'--out={tmp_path}', '--format=stablehlo'], 'is a folder'),
        ([f'--out={out}', '--format=timm'], 'is a file'),
        ([f'--out={tmp_path / "a.bin"}'], 'ends in .safetensors'),
    ):
        _, err = finish(start('export', f'--workdir={simclr}', *flags), code=2)
        assert expected in err


@pytest.mark.parametrize('frozen', [False, True])
def test_a_run_starts_from_a_file(tmp_path, frozen):
    """What the config does not say of the model is as in the file; the patch projection may be
    frozen here and learned there."""
    path = timm_file(tmp_path)
    config = runpy.run_path(str(ROOT / 'configs/simclr_vit.py'))['get_config']('digits')
    sizes = {'name': 'vit', 'width': 64, 'depth': 2, 'heads': 1, 'patch': 4, 'pool': 'cls'}
    with config.unlocked():
        config.update({'init_from': str(path), 'batch_size': 16, 'total_steps': 2})
        config.model = {**sizes, 'freeze_patch_embedding': frozen}
    whole = initial.complete(config)
    assert (whole.model.activation, whole.model.position) == ('gelu', 'learned')
    assert 'activation' not in config.model
    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = experiment.open(whole, None, mesh).init()
        encode = jax.jit(experiment.build_method(whole, {}).encode)
        image = images_of() / np.float32(255)
        found = encode(state.params, state.extra, {'image': image})['features']
        expected = encoded_by(weights.read(path), 'features', image=image)
        assert np.abs(found - expected).max() < 1e-5
        with whole.unlocked():
            whole.model.depth = 1
        with pytest.raises(UserError, match=r'vit.safetensors do not fit this encoder'):
            experiment.open(whole, None, mesh).init()
