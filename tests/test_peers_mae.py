"""MAE beside transformers' ViTMAE at random weights and with the same masks: loss and gradients.

It needs PyTorch, which nothing else here does, so this test is skipped where it is missing:

    pip install torch transformers && python -m pytest tests/test_peers_mae.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.layers.blocks import sincos2d
from contrastive_jax.methods import mae
from contrastive_jax.models import vit

torch = pytest.importorskip('torch')
peers = pytest.importorskip('transformers')

B, SIDE, PATCH, WIDTH, DEPTH, HEADS = 4, 16, 4, 32, 2, 4
DECODER = {'width': 16, 'depth': 2, 'heads': 2}


def peer(normalise):
    config = peers.ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_act='gelu',
        layer_norm_eps=1e-6,
        image_size=SIDE,
        patch_size=PATCH,
        decoder_hidden_size=DECODER['width'],
        decoder_num_hidden_layers=DECODER['depth'],
        decoder_num_attention_heads=DECODER['heads'],
        decoder_intermediate_size=4 * DECODER['width'],
        mask_ratio=0.75,
        norm_pix_loss=normalise,
    )
    torch.manual_seed(0)
    model = peers.ViTMAEForPreTraining(config).eval()
    grid = SIDE // PATCH
    fixed = {
        'vit.embeddings.position_embeddings': WIDTH,
        'decoder.decoder_pos_embed': DECODER['width'],
    }
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name in fixed:  # theirs have columns before rows
                x[0, 1:] = torch.tensor(sincos2d(grid, grid, fixed[name]))
            else:
                x.add_(0.1 * torch.randn(x.shape))
    return model


def ours(tensors):
    """Their parameters, or the gradients of these, in our tree."""
    x = {name: tensor.numpy() for name, tensor in tensors.items()}

    def dense(name):
        return {'kernel': x[f'{name}.weight'].T, 'bias': x[f'{name}.bias']}

    def norm(name):
        return {'scale': x[f'{name}.weight'], 'bias': x[f'{name}.bias']}

    def block(name):
        parts = [dense(f'{name}.attention.attention.{p}') for p in ('query', 'key', 'value')]
        qkv = {k: np.concatenate([p[k] for p in parts], -1) for k in ('kernel', 'bias')}
        return {
            'norm1': norm(f'{name}.layernorm_before'),
            'attention': {'qkv': qkv, 'out': dense(f'{name}.attention.output.dense')},
            'norm2': norm(f'{name}.layernorm_after'),
            'mlp1': dense(f'{name}.intermediate.dense'),
            'mlp2': dense(f'{name}.output.dense'),
        }

    patches = 'vit.embeddings.patch_embeddings.projection'
    kernel = x[f'{patches}.weight'].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    encoder = {
        'patch_embedding': {'kernel': kernel, 'bias': x[f'{patches}.bias']},
        'cls_token': x['vit.embeddings.cls_token'],
        'norm': norm('vit.layernorm'),
        **{f'block{i}': block(f'vit.encoder.layer.{i}') for i in range(DEPTH)},
    }
    decoder = {
        'embedding': dense('decoder.decoder_embed'),
        'mask_token': x['decoder.mask_token'],
        'norm': norm('decoder.decoder_norm'),
        'out': dense('decoder.decoder_pred'),
        **{f'block{i}': block(f'decoder.decoder_layers.{i}') for i in range(DECODER['depth'])},
    }
    return {'encoder': encoder, 'decoder': decoder}


@pytest.mark.parametrize('normalise', [True, False])
def test_loss_and_gradients_are_those_of_transformers(normalise):
    model = vit.make(
        width=WIDTH, depth=DEPTH, heads=HEADS, patch=PATCH, activation='gelu', start='mae'
    )
    method = mae.make(model, normalise=normalise, activation='gelu', **DECODER)
    x = np.random.default_rng(1).normal(size=(B, SIDE, SIDE, 3)).astype(np.float32)
    batch, key = {'views': jnp.asarray(x)[:, None]}, jax.random.key(5)
    params, extra = method.init(jax.random.key(0), batch, 10)

    theirs = peer(normalise)
    given = ours(theirs.state_dict())
    assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, params)
    step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (value, _), gradients = step(given, extra, batch, key, jnp.float32(0))

    # As the method draws it.
    noise = jax.random.uniform(jax.random.split(key)[0], (B, (SIDE // PATCH) ** 2))
    out = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), noise=torch.tensor(np.asarray(noise)))
    out.loss.backward()
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-5)
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = ours(found)
    for (path, g), w in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        assert np.abs(np.asarray(g) - w).max() <= 1e-4 * max(np.abs(w).max(), 1e-2), path
