"""Encoders of timm, transformers and OpenCLIP, at random weights, as `contrastive_jax.load` sees
them and as `export` writes them back: equal features.

They need PyTorch, which nothing else here does, so these tests are skipped where it is missing:

    pip install torch timm transformers open_clip_torch
    python -m pytest tests/test_peers_weights.py
"""

import json

import numpy as np
import pytest
from pictures import photo

import contrastive_jax

torch = pytest.importorskip('torch')
timm = pytest.importorskip('timm')
peers = pytest.importorskip('transformers')
save_file = pytest.importorskip('safetensors.torch').save_file

TOLERANCE = 1e-4  # of the largest feature


def shaken(model, seed=0):
    """With every parameter and average at random, so that none that is mixed up goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.dtype.is_floating_point and x.ndim:
                noise = torch.randn(x.shape, generator=generator)
                if name.endswith('running_var'):
                    x.copy_(1 + 0.1 * noise.abs())
                elif x.ndim > 1:
                    x.copy_(noise * (x[0].numel() ** -0.5 if x.shape[0] > 1 else 0.3))
                else:
                    x.add_(0.1 * noise)
    return model.eval()


def saved(model, folder, **files):
    path = folder / 'model.safetensors'
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, str(path))
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return path


def pictures(encoder, count=2):
    """uint8 for ours and the same in torch's layout, normalised."""
    d = encoder.config.data
    images = np.stack([photo(i, d.image_size, d.image_size) for i in range(count)])
    x = (images / 255 - np.asarray(d.mean)) / np.asarray(d.std)
    return images, torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


TIMM = {
    'vit_tiny_patch16_224': {},
    'vit_small_patch16_224': {},
    'vit_base_patch16_224': {},
    'vit_small_patch14_dinov2': {'img_size': 224},
    'vit_small_patch14_reg4_dinov2': {'img_size': 224},
    'vit_base_patch32_clip_224': {},
    'vit_base_patch32_clip_quickgelu_224': {},
    'vit_base_patch16_siglip_224': {},
    'resnet18': {},
    'resnet50': {},
}


@pytest.mark.parametrize('name', TIMM)
def test_timm(name, tmp_path):
    model = shaken(timm.create_model(name, num_classes=0, **TIMM[name]))
    path = saved(model, tmp_path, config={'architecture': name, 'pretrained_cfg': {}})
    encoder = contrastive_jax.load(path, batch_size=1)
    images, x = pictures(encoder)
    with torch.no_grad():
        close(encoder(images), model(x))
