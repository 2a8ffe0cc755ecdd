"""Encoders of timm, transformers and OpenCLIP at random weights: as `contrastive_jax.load` has them
and as `export` writes them back, their features are theirs.

They need PyTorch, which nothing else here does, so these tests are skipped where it is missing:

    pip install torch timm transformers open_clip_torch
    python -m pytest tests/test_peers_weights.py  # -m slow: the published sizes
"""

import json
import os

import jax
import numpy as np
import pytest
from pictures import photo

import contrastive_jax
from contrastive_jax import weights
from contrastive_jax.weights import positions, targets

os.environ['HF_HUB_OFFLINE'] = '1'
torch = pytest.importorskip('torch')
timm = pytest.importorskip('timm')
peers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors.torch')
open_clip = pytest.importorskip('open_clip')

TOLERANCE = 1e-4  # of the largest feature


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])


def shaken(model):
    """With every parameter and average at random, so that none that is mixed up goes unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.dtype.is_floating_point and x.ndim:
                noise = torch.randn(x.shape, generator=generator)
                if name.endswith('running_var'):
                    x.copy_(1 + 0.1 * noise.abs())
                elif x.ndim > 1 and 'embed' in name and 'proj' not in name:
                    x.copy_(0.3 * noise)
                elif x.ndim > 1:
                    x.copy_(noise * max(1, x[0].numel()) ** -0.5)
                else:
                    x.add_(0.1 * noise)
    return model.eval()


def saved(model, folder, **files):
    """The path of its weights, with JSON files beside."""
    path = folder / 'model.safetensors'
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    safetensors.save_file(state, str(path))
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return path


def written(found, folder):
    for name, content in found.items():
        weights.files.write(targets.content(content), folder / name)
    return folder


def pictures(encoder, count=2):
    """uint8 for ours and the same in torch's layout, normalised."""
    d = encoder.config.data
    assert d.crop_fraction == 1
    images = np.stack([photo(i, d.image_size, d.image_size) for i in range(count)])
    x = (images / 255 - np.asarray(d.mean)) / np.asarray(d.std)
    return images, torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def close(ours, theirs):
    ours, theirs = (np.asarray(x.detach() if hasattr(x, 'detach') else x) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= TOLERANCE
    print(f'{error:.1e}')


def from_timm(folder, x):
    """Features of what was written for timm, strictly read."""
    config = json.loads((folder / 'config.json').read_text())
    model = timm.create_model(config['architecture'], **config['model_args'])
    model.load_state_dict(safetensors.load_file(folder / 'model.safetensors'), strict=True)
    with torch.no_grad():
        found = model.eval()(x)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert torch.equal(model(x), found)
    return found


def from_transformers(folder, x):
    """Features of what was written for transformers."""
    model, report = peers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report['unexpected_keys']
    assert all('pooler' in key for key in report['missing_keys'])
    features = json.loads((folder / 'config.json').read_text())['contrastive_jax']['features']
    with torch.no_grad():
        return eval(features, {}, dict(model.eval()(pixel_values=x)))


SMALL = {'embed_dim': 64, 'depth': 2, 'num_heads': 1}
FULL = pytest.mark.slow
TIMM = {
    'cls': ('vit_tiny_patch16_224', {**SMALL, 'img_size': 32, 'patch_size': 8}),
    'mean': (
        'vit_tiny_patch16_224',
        {**SMALL, 'img_size': 32, 'class_token': False, 'global_pool': 'avg', 'fc_norm': False},
    ),
    'dinov2': ('vit_small_patch14_dinov2', {**SMALL, 'img_size': 28}),
    'registers': ('vit_small_patch14_reg4_dinov2', {**SMALL, 'img_size': 28}),
    'clip': ('vit_base_patch32_clip_quickgelu_224', {**SMALL, 'img_size': 64}),
    'siglip': ('vit_base_patch16_siglip_224', {**SMALL, 'num_heads': 4, 'img_size': 32}),
    'basic': ('resnet18', {'layers': [1, 2, 1, 1], 'channels': [64, 32, 48, 64]}),
    'bottleneck': ('resnet50', {'layers': [1, 2, 1, 1], 'channels': [64, 16, 24, 32]}),
}
SIZES = {  # as published
    'ViT-Ti/16': ('vit_tiny_patch16_224', {}),
    'ViT-S/16': ('vit_small_patch16_224', {}),
    'ViT-B/16': ('vit_base_patch16_224', {}),
    'ResNet-18': ('resnet18', {}),
    'ResNet-50': ('resnet50', {}),
    'CLIP ViT-B/32': ('vit_base_patch32_clip_quickgelu_224', {}),
    'SigLIP B/16': ('vit_base_patch16_siglip_224', {}),
    'DINOv2 S/14': ('vit_small_patch14_dinov2', {'img_size': 224}),
}


@pytest.mark.parametrize('name', [*TIMM, *(pytest.param(n, marks=FULL) for n in SIZES)])
def test_timm(name, tmp_path):
    architecture, options = (TIMM | SIZES)[name]
    model = shaken(timm.create_model(architecture, num_classes=0, **options))
    side = options.get('img_size', 224 if name in SIZES else 64)
    cfg = {'crop_pct': 1.0, 'input_size': [3, side, side]}
    args = {k: v for k, v in options.items() if k == 'num_heads'}
    about = {'architecture': architecture, 'pretrained_cfg': cfg, 'model_args': args}
    if 'img_size' not in options and name == 'mean':
        model.set_input_size((side, side))
    path = saved(model, tmp_path, config=about)
    encoder = contrastive_jax.load(path, batch_size=2)
    images, x = pictures(encoder)
    with torch.no_grad():
        expected = model(x)
    close(encoder(images), expected)
    found = weights.read(path)
    close(from_timm(written(targets.timm(found), tmp_path / 'timm'), x), expected)
    folder = written(targets.transformers(found), tmp_path / 'transformers')
    close(from_transformers(folder, x), expected)
    again = contrastive_jax.load(folder / 'model.safetensors', batch_size=2)
    close(again(images), expected)


TINY = {
    'hidden_size': 64,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 128,
    'image_size': 32,
    'patch_size': 8,
}


def whole(model, folder, side):
    """Saved by its own method, with what its preprocessor would say."""
    model.save_pretrained(folder)
    moments = {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.25, 0.3]}
    about = {**moments, 'size': {'height': side, 'width': side}, 'resample': 2}
    (folder / 'preprocessor_config.json').write_text(json.dumps(about))
    encoder = contrastive_jax.load(folder / 'model.safetensors', batch_size=2)
    d = encoder.config.data
    assert (tuple(d.mean), d.crop.interpolation) == ((0.4, 0.5, 0.6), 'bilinear')
    return encoder, weights.read(folder / 'model.safetensors')


@pytest.mark.parametrize(
    'kind', ['ViT', 'ViTMAE', 'Dinov2', 'Dinov2WithRegisters', 'ResNet', 'SiglipVision']
)
def test_transformers(kind, tmp_path):
    options = TINY
    if kind.startswith('Dinov2'):
        options = {**TINY, 'mlp_ratio': 2}
    if kind == 'ResNet':
        options = {'depths': [1, 2], 'hidden_sizes': [32, 48], 'embedding_size': 8}
    if kind == 'ViTMAE':
        options = {**TINY, 'mask_ratio': 0.0}
    model = shaken(getattr(peers, f'{kind}Model')(getattr(peers, f'{kind}Config')(**options)))
    encoder, found = whole(model, tmp_path, 32)
    images, x = pictures(encoder)
    with torch.no_grad():
        out = model(pixel_values=x)
    pooled = kind in ('ResNet', 'SiglipVision')
    expected = out.pooler_output.flatten(1) if pooled else out.last_hidden_state[:, 0]
    close(encoder(images), expected)
    folder = written(targets.transformers(found), tmp_path / 'again')
    close(from_transformers(folder, x), expected)


def texts(length, end, padding, count=3):
    """Ids of ours, and of theirs with the padding that they know."""
    rng = np.random.default_rng(0)
    ours = np.full((count, length), -1)
    for i in range(count):
        ours[i, : 3 + i] = [*rng.integers(5, end, 2 + i), end]
    return ours, torch.tensor(np.where(ours < 0, padding, ours))


CLIPS = {
    'small': ({**TINY}, {**TINY, 'vocab_size': 50, 'max_position_embeddings': 9}, 48),
    'ViT-B/32': (
        {'patch_size': 32},
        {'vocab_size': 49408, 'max_position_embeddings': 77},
        512,
    ),
}


@pytest.mark.parametrize('name', ['small', pytest.param('ViT-B/32', marks=FULL)])
def test_clip_of_transformers(name, tmp_path):
    vision, text, width = CLIPS[name]
    end = text['vocab_size'] - 1
    text = {**text, 'eos_token_id': end, 'bos_token_id': end - 1}
    config = peers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
    model = shaken(peers.CLIPModel(config))
    encoder, found = whole(model, tmp_path, vision.get('image_size', 224))
    images, x = pictures(encoder)
    ours, theirs = texts(text['max_position_embeddings'], end, 0)
    with torch.no_grad():
        features = model.vision_model(pixel_values=x).pooler_output
        image = model.get_image_features(pixel_values=x).pooler_output
        words = model.get_text_features(input_ids=theirs).pooler_output
        alike = model(pixel_values=x, input_ids=theirs).logits_per_image
    close(encoder(images), features)
    close(encoder(images, 'embedding'), image)
    close(of_texts(found, ours), words)
    close(similar(found, encoder(images, 'embedding'), of_texts(found, ours)), alike)
    folder = written(targets.transformers(found), tmp_path / 'again')
    again = peers.AutoModel.from_pretrained(folder).eval()
    assert isinstance(again, peers.CLIPModel)
    again.config.text_config.eos_token_id = again.text_model.eos_token_id = end
    with torch.no_grad():
        close(again(pixel_values=x, input_ids=theirs).logits_per_image, alike)
    assert again.load_state_dict(model.state_dict(), strict=True)


def of_texts(found, ids):
    encode, state = weights.encoder(found)
    return np.asarray(encode(*state, {'text': np.asarray(ids, np.int32)})['embedding'])


def similar(found, images, words):
    scale, bias = (found.encoders['similarity'][0].get(f'logit_{n}', 0) for n in ('scale', 'bias'))
    images, words = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, words))
    return images @ words.T * np.exp(scale) + bias


@pytest.mark.parametrize('name', ['small', pytest.param('B/16', marks=FULL)])
def test_siglip_of_transformers(name, tmp_path):
    small = name == 'small'
    text = {'vocab_size': 50, 'max_position_embeddings': 9, 'projection_size': 64, **TINY}
    text = text if small else {'vocab_size': 32000, 'max_position_embeddings': 64}
    vision = TINY if small else {'image_size': 224, 'patch_size': 16}
    config = peers.SiglipConfig(vision_config=vision, text_config=text)
    model = shaken(peers.SiglipModel(config))
    encoder, found = whole(model, tmp_path, 32 if small else 224)
    images, x = pictures(encoder)
    ours, theirs = texts(text['max_position_embeddings'], 49, 1)
    with torch.no_grad():
        out = model(pixel_values=x, input_ids=theirs)
        image = model.get_image_features(pixel_values=x).pooler_output
        words = model.get_text_features(input_ids=theirs).pooler_output
    close(encoder(images, 'embedding'), image)
    close(of_texts(found, ours), words)
    close(of_texts(found, ours[:, :7]), words)
    both = similar(found, encoder(images, 'embedding'), of_texts(found, ours))
    close(both, out.logits_per_image)
    folder = written(targets.transformers(found), tmp_path / 'again')
    again = peers.AutoModel.from_pretrained(folder).eval()
    assert isinstance(again, peers.SiglipModel)
    with torch.no_grad():
        close(again(pixel_values=x, input_ids=theirs).logits_per_image, out.logits_per_image)


@pytest.mark.parametrize('name', ['small', pytest.param('ViT-B-32-quickgelu', marks=FULL)])
def test_clip_of_open_clip(name, tmp_path):
    if name == 'small':
        vision = {'image_size': 32, 'layers': 2, 'width': 64, 'patch_size': 8, 'head_width': 16}
        text = {'context_length': 9, 'vocab_size': 50, 'width': 64, 'heads': 4, 'layers': 2}
        config = {'embed_dim': 24, 'vision_cfg': vision, 'text_cfg': text}
        model = open_clip.model.CLIP(**config)
    else:
        config = open_clip.get_model_config(name)
        model, text = open_clip.create_model(name), config['text_cfg']
    model = shaken(model)
    about = {'model_cfg': config, 'preprocess_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3}}
    path = saved(model, tmp_path, open_clip_config=about)
    encoder, found = contrastive_jax.load(path, batch_size=2), weights.read(path)
    images, x = pictures(encoder)
    ours, theirs = texts(text['context_length'], text['vocab_size'] - 1, 0)
    with torch.no_grad():
        image, words = model.encode_image(x), model.encode_text(theirs)
    close(encoder(images, 'embedding'), image)
    close(of_texts(found, ours), words)
    folder = written(targets.transformers(found), tmp_path / 'again')
    again = peers.AutoModel.from_pretrained(folder).eval()
    again.text_model.eos_token_id = text['vocab_size'] - 1
    with torch.no_grad():
        close(again.get_image_features(pixel_values=x).pooler_output, image)
        close(again.get_text_features(input_ids=theirs).pooler_output, words)


def test_siglip_of_open_clip(tmp_path):
    vision = {
        'image_size': 224,
        'timm_model_name': 'vit_tiny_patch16_224',
        'timm_pool': 'map',
        'timm_proj': 'none',
    }
    text = {
        **{'context_length': 9, 'vocab_size': 50, 'width': 192, 'heads': 3, 'layers': 2},
        **{'no_causal_mask': True, 'proj_bias': True, 'pool_type': 'last'},
        **{'norm_kwargs': {'eps': 1e-6}},
    }
    model = open_clip.model.CustomTextCLIP(embed_dim=192, vision_cfg=vision, text_cfg=text)
    # As the published ones: no CLS token.
    more = {'class_token': False, 'global_pool': 'map', 'num_classes': 0}
    model.visual.trunk = timm.create_model('vit_tiny_patch16_224', **more)
    model = shaken(model)
    path = saved(model, tmp_path)
    encoder, found = contrastive_jax.load(path, batch_size=2), weights.read(path)
    images, x = pictures(encoder)
    ours, theirs = texts(9, 49, 1)
    with torch.no_grad():
        close(encoder(images, 'embedding'), model.encode_image(x))
        close(of_texts(found, ours), model.encode_text(theirs))


@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('side', [5, 9, 16])
def test_positions_are_resampled_as_in_torch(side, antialias):
    grid = np.random.default_rng(0).normal(size=(9, 9, 4)).astype(np.float32)
    x = torch.tensor(grid.transpose(2, 0, 1)[None])
    theirs = torch.nn.functional.interpolate(
        x, size=(side, side), mode='bicubic', antialias=antialias, align_corners=False
    )
    close(positions.resample(grid, side, antialias), theirs[0].permute(1, 2, 0))


def test_images_of_another_size(tmp_path):
    model = shaken(peers.Dinov2Model(peers.Dinov2Config(**TINY, mlp_ratio=2)))
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    encoder = contrastive_jax.load(path, batch_size=2, image_size=48)
    images, x = pictures(encoder)
    with torch.no_grad():
        close(encoder(images), model(x).last_hidden_state[:, 0])
