"""Names that other libraries give to the parameters of ours: see `names`."""

from typing import Any

from contrastive_jax.weights import names
from contrastive_jax.weights.names import Flat, Part, Table


def _blocks(theirs: str, *modules: Any) -> Table:
    ours = ('norm1', 'attention/qkv', 'attention/out', 'norm2', 'mlp1', 'mlp2')
    rows = zip(ours, modules, strict=True)
    return {
        f'block{{i}}/{name}': names.renamed(module, lambda n: f'{theirs}.{{i}}.{n}')
        for name, module in rows
    }


def _separate(prefix: str, *qkv: str) -> tuple[str, ...]:
    return tuple(f'{prefix}.{name}' for name in qkv)


TIMM: Table = {
    'cls_token': 'cls_token',
    'position_embedding': 'pos_embed',
    'register_tokens': 'reg_token',
    'patch_embedding': 'patch_embed.proj',
    'norm_pre': 'norm_pre',
    **_blocks('blocks', 'norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2'),
    'block{i}/layer_scale1': 'blocks.{i}.ls1.gamma',
    'block{i}/layer_scale2': 'blocks.{i}.ls2.gamma',
    'norm': 'norm',
    'pool/probe': 'attn_pool.latent',
    'pool/query': 'attn_pool.q',
    'pool/key': Part('attn_pool.kv', 0, 2),
    'pool/value': Part('attn_pool.kv', 1, 2),
    'pool/out': 'attn_pool.proj',
    'pool/norm': 'attn_pool.norm',
    'pool/mlp1': 'attn_pool.mlp.fc1',
    'pool/mlp2': 'attn_pool.mlp.fc2',
}
_HF_EMBEDDINGS: Table = {
    'cls_token': 'embeddings.cls_token',
    'position_embedding': 'embeddings.position_embeddings',
    'register_tokens': 'embeddings.register_tokens',
    'patch_embedding': 'embeddings.patch_embeddings.projection',
    'norm': 'layernorm',
}
_HF_ATTENTION = (
    _separate('attention.attention', 'query', 'key', 'value'),
    'attention.output.dense',
)
HF_VIT: Table = {
    **_HF_EMBEDDINGS,
    **_blocks(
        *('encoder.layer', 'layernorm_before', *_HF_ATTENTION),
        *('layernorm_after', 'intermediate.dense', 'output.dense'),
    ),
}
HF_DINOV2: Table = {
    **_HF_EMBEDDINGS,
    **_blocks('encoder.layer', 'norm1', *_HF_ATTENTION, 'norm2', 'mlp.fc1', 'mlp.fc2'),
    'block{i}/layer_scale1': 'encoder.layer.{i}.layer_scale1.lambda1',
    'block{i}/layer_scale2': 'encoder.layer.{i}.layer_scale2.lambda1',
}


def _hf_clip_blocks(tower: str) -> Table:
    qkv = _separate('self_attn', 'q_proj', 'k_proj', 'v_proj')
    return _blocks(
        *(f'{tower}.encoder.layers', 'layer_norm1', qkv, 'self_attn.out_proj'),
        *('layer_norm2', 'mlp.fc1', 'mlp.fc2'),
    )


HF_CLIP: Table = {
    'cls_token': Flat('vision_model.embeddings.class_embedding'),
    'position_embedding': Flat('vision_model.embeddings.position_embedding.weight'),
    'patch_embedding': 'vision_model.embeddings.patch_embedding',
    'norm_pre': 'vision_model.pre_layrnorm',
    **_hf_clip_blocks('vision_model'),
    'norm': 'vision_model.post_layernorm',
}
_HF_PROBE = 'vision_model.head.attention.in_proj_'
HF_SIGLIP: Table = {
    **{name: HF_CLIP[name] for name in HF_CLIP if name not in ('cls_token', 'norm_pre')},
    'pool/probe': 'vision_model.head.probe',
    'pool/query': Part(_HF_PROBE, 0, 3),
    'pool/key': Part(_HF_PROBE, 1, 3),
    'pool/value': Part(_HF_PROBE, 2, 3),
    'pool/out': 'vision_model.head.attention.out_proj',
    'pool/norm': 'vision_model.head.layernorm',
    'pool/mlp1': 'vision_model.head.mlp.fc1',
    'pool/mlp2': 'vision_model.head.mlp.fc2',
}
HF_TEXT: Table = {
    'token_embedding': 'text_model.embeddings.token_embedding.weight',
    'position_embedding': Flat('text_model.embeddings.position_embedding.weight'),
    **_hf_clip_blocks('text_model'),
    'norm': 'text_model.final_layer_norm',
}


def _openai_blocks(prefix: str) -> Table:
    return _blocks(
        *(f'{prefix}transformer.resblocks', 'ln_1', 'attn.in_proj_', 'attn.out_proj'),
        *('ln_2', 'mlp.c_fc', 'mlp.c_proj'),
    )


OPENAI_CLIP: Table = {
    'cls_token': Flat('visual.class_embedding'),
    'position_embedding': Flat('visual.positional_embedding'),
    'patch_embedding': 'visual.conv1',
    'norm_pre': 'visual.ln_pre',
    **_openai_blocks('visual.'),
    'norm': 'visual.ln_post',
}


def openai_text(prefix: str) -> Table:
    return {
        'token_embedding': f'{prefix}token_embedding.weight',
        'position_embedding': Flat(f'{prefix}positional_embedding'),
        **_openai_blocks(prefix),
        'norm': f'{prefix}ln_final',
    }


def _resnet(conv: str, norm: str, shortcut: tuple[str, str]) -> Table:
    """Table of a block, from names of its convolutions (n counts from 1, m from 0) and norms."""
    out: dict[str, names.Theirs] = {}
    for n in (1, 2, 3):
        for ours, theirs in (('conv', conv), ('norm', norm)):
            name = theirs.replace('{n}', str(n)).replace('{m}', str(n - 1))
            out[f'stage{{s}}_block{{i}}/{ours}{n}'] = name
    out['stage{s}_block{i}/shortcut'], out['stage{s}_block{i}/shortcut_norm'] = shortcut
    return out


TIMM_RESNET: Table = {
    'stem': 'conv1',
    'stem_norm': 'bn1',
    **_resnet(
        'layer{s}.{i}.conv{n}',
        'layer{s}.{i}.bn{n}',
        ('layer{s}.{i}.downsample.0', 'layer{s}.{i}.downsample.1'),
    ),
}
_HF_BLOCK = 'encoder.stages.{z}.layers.{i}'
HF_RESNET: Table = {
    'stem': 'embedder.embedder.convolution',
    'stem_norm': 'embedder.embedder.normalization',
    **_resnet(
        f'{_HF_BLOCK}.layer.{{m}}.convolution',
        f'{_HF_BLOCK}.layer.{{m}}.normalization',
        (f'{_HF_BLOCK}.shortcut.convolution', f'{_HF_BLOCK}.shortcut.normalization'),
    ),
}
