"""An encoder of ours in the names of timm and of transformers, with the JSON that both build it by.

What cannot be said there is a UserError; what can only be said otherwise is rewritten so that the
outputs are equal: fixed positions as learned ones, a bias of the patch projection as a part of the
positions, CLS's position as a part of CLS.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from contrastive_jax import config as config_lib
from contrastive_jax.config import UserError
from contrastive_jax.layers.blocks import sincos2d
from contrastive_jax.weights import Weights, families, names, tables, tokenizer
from contrastive_jax.weights.names import Table

Arrays = dict[str, np.ndarray]
Files = dict[str, Any]  # name -> arrays of a .safetensors file, content of a JSON file, or bytes

HF_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'quick_gelu': 'quick_gelu'}
# Architectures of timm by what their arguments cannot say.
TIMM_VITS = {1e-6: 'vit_base_patch16_224', 1e-5: 'vit_base_patch32_clip_224'}


def timm(weights: Weights) -> Files:
    """`timm.create_model('local-dir:OUT', pretrained=True)` reads them, or `create_model` by the
    'architecture' and 'model_args' of the config.json, then `load_state_dict`.

    Raises:
        UserError: timm has no such model.
    """
    module, params, size = _parts(weights)
    make = {'vit': _timm_vit, 'resnet': _timm_resnet}
    convert = config_lib.choose('model', weights.config.model.name, make, 'timm')
    architecture, arguments, arrays = convert(module, params, size)
    data = weights.config.inputs
    seeing = {
        'mean': data.mean,
        'std': data.std,
        'input_size': (3, size, size),
        'interpolation': data.crop.interpolation,
        'crop_pct': data.crop_fraction,
        'crop_mode': 'center',
        'num_classes': 0,
    }
    config = {
        'architecture': architecture,
        'num_classes': 0,
        'model_args': {**arguments, 'num_classes': 0},
        'pretrained_cfg': seeing,
    }
    return {'config.json': config, 'model.safetensors': arrays}


def _timm_vit(module: Any, params: Arrays, size: int) -> tuple[str, dict[str, Any], Arrays]:
    if module.epsilon not in TIMM_VITS:
        raise UserError(
            f'timm: got epsilon {module.epsilon} of LayerNorm; expected one of {tuple(TIMM_VITS)}.'
        )
    pools = {'cls': 'token', 'mean': 'avg', 'map': 'map'}
    pool = config_lib.choose('pool', module.pool, pools, 'timm')
    _patch_bias(module, params, wanted=not module.norm_pre)
    if module.registers:  # positions are then those of the patches alone
        _cls_position(module, params)
    arguments = {
        'img_size': size,
        'patch_size': module.patch,
        'embed_dim': module.width,
        'depth': module.depth,
        'num_heads': module.heads,
        'mlp_ratio': _ratio(module),
        'class_token': module.cls_token,
        'global_pool': pool,
        'fc_norm': False,
        'reg_tokens': module.registers,
        'no_embed_class': bool(module.registers),
        'init_values': module.layer_scale,
        'pre_norm': module.norm_pre,
        'act_layer': module.activation,
    }
    arrays = names.write(names.expand(tables.TIMM, _places(module)), params)
    return TIMM_VITS[module.epsilon], arguments, arrays


def _timm_resnet(module: Any, params: Arrays, size: int) -> tuple[str, dict[str, Any], Arrays]:
    del size
    _plain_resnet(module, 'timm')
    if module.widths[0] != 64 or len(module.widths) != 4:
        raise UserError(
            f'timm: got widths {list(module.widths)} of a ResNet; expected 4, the first of them 64.'
        )
    architecture = {'basic': 'resnet18', 'bottleneck': 'resnet50'}[module.block]
    arguments = {'layers': module.blocks, 'channels': module.widths}
    return architecture, arguments, _resnet_arrays(tables.TIMM_RESNET, module, params)


def transformers(weights: Weights) -> Files:
    """`AutoModel.from_pretrained(OUT)` reads them. The key 'contrastive_jax' of config.json says
    which of the model's outputs are our features.

    A run with texts becomes a CLIPModel or a SiglipModel where both towers are such ones; else its
    image encoder is written alone.

    Raises:
        UserError: transformers has no such model.
    """
    module, params, size = _parts(weights)
    make = {'vit': _hf_vit, 'resnet': _hf_resnet}
    convert = config_lib.choose('model', weights.config.model.name, make, 'transformers')
    config, arrays, prefix = convert(module, params, size)
    files: Files = {}
    both = _hf_towers(weights, config['model_type'])
    if both is not None:
        texts, more, name = both
        config = {'model_type': name, **more, 'vision_config': config, 'text_config': texts[0]}
        config['contrastive_jax'] = config['vision_config'].pop('contrastive_jax')
        config['architectures'] = [{'clip': 'CLIPModel', 'siglip': 'SiglipModel'}[name]]
        arrays = {**{f'{prefix}{k}': v for k, v in arrays.items()}, **texts[1]}
        if weights.tokenizer and weights.tokenizer[0].endswith('.json'):
            files['tokenizer.json'] = weights.tokenizer[1]
    data = weights.config.inputs
    side = round(data.size / data.crop_fraction)
    files['preprocessor_config.json'] = {
        'image_processor_type': 'CLIPImageProcessor',
        'do_resize': True,
        'size': {'shortest_edge': side},
        'do_center_crop': True,
        'crop_size': {'height': data.size, 'width': data.size},
        'resample': {'bilinear': 2, 'bicubic': 3}[data.crop.interpolation],
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': data.mean,
        'image_std': data.std,
        'do_convert_rgb': True,
    }
    return files | {'config.json': config, 'model.safetensors': arrays}


def _hf_vit(module: Any, params: Arrays, size: int) -> tuple[dict[str, Any], Arrays, str]:
    config = {**_hf_blocks(module), 'image_size': size, 'patch_size': module.patch}
    scaled = module.layer_scale is not None
    places, prefix, features = _places(module), '', 'last_hidden_state[:, 0]'
    if not module.cls_token:
        if module.norm_pre or scaled or module.registers:
            raise UserError(
                'transformers: has no ViT without a CLS token that has norm_pre, layer_scale or '
                'registers.'
            )
        name, architecture, table = 'siglip_vision_model', 'SiglipVisionModel', tables.HF_SIGLIP
        _patch_bias(module, params, wanted=True)
        config['vision_use_head'] = module.pool == 'map'
        features = 'last_hidden_state.mean(1)' if module.pool == 'mean' else 'pooler_output'
        prefix = 'vision_model.'
    elif module.norm_pre:
        if scaled or module.registers or module.pool != 'cls':
            raise UserError(
                "transformers: a ViT with norm_pre is CLIP's, which has pool='cls', no layer_scale "
                'and no registers.'
            )
        name, architecture, table = 'clip_vision_model', 'CLIPVisionModel', tables.HF_CLIP
        _patch_bias(module, params, wanted=False)
        features, prefix = 'pooler_output', 'vision_model.'
    elif module.pool == 'map':
        raise UserError("transformers: has no ViT with a CLS token and pool='map'.")
    elif scaled or module.registers:
        _patch_bias(module, params, wanted=True)
        if module.hidden % module.width:
            raise UserError('transformers: DINOv2 needs a whole mlp_ratio.')
        config |= {'mlp_ratio': module.hidden // module.width, 'use_mask_token': True}
        name, architecture, table = 'dinov2', 'Dinov2Model', tables.HF_DINOV2
        if module.registers:
            name, architecture = 'dinov2_with_registers', 'Dinov2WithRegistersModel'
            config['num_register_tokens'] = module.registers
        if not scaled:
            ones = np.ones(module.width, np.float32)
            params |= {
                f'block{i}/layer_scale{n}': ones for i in range(module.depth) for n in (1, 2)
            }
    else:
        _patch_bias(module, params, wanted=True)
        name, architecture, table = 'vit', 'ViTModel', tables.HF_VIT
    first = 1 + module.registers
    if module.cls_token and module.pool != 'cls':
        mean = f'last_hidden_state[:, {first}:].mean(1)'
        both = f'concatenation of last_hidden_state[:, 0] and {mean}'
        features = both if module.pool == 'cls_mean' else mean
    arrays = names.write(names.expand(table, places), params)
    if table is tables.HF_DINOV2:
        arrays['embeddings.mask_token'] = np.zeros((1, module.width), np.float32)
    arrays = {k.removeprefix(prefix): v for k, v in arrays.items()}
    config |= {
        'model_type': name,
        'architectures': [architecture],
        'contrastive_jax': {'features': features},
    }
    return config, arrays, prefix


def _hf_blocks(module: Any) -> dict[str, Any]:
    """Keys of a config that describe a transformer's blocks, of images or of texts."""
    return {
        'hidden_size': module.width,
        'num_hidden_layers': module.depth,
        'num_attention_heads': module.heads,
        'intermediate_size': module.hidden,
        'hidden_act': HF_ACTIVATIONS[module.activation],
        'layer_norm_eps': module.epsilon,
    }


def _hf_resnet(module: Any, params: Arrays, size: int) -> tuple[dict[str, Any], Arrays, str]:
    del size
    _plain_resnet(module, 'transformers')
    wider = {'basic': 1, 'bottleneck': 4}[module.block]
    config = {
        'model_type': 'resnet',
        'architectures': ['ResNetModel'],
        'embedding_size': module.widths[0],
        'hidden_sizes': [width * wider for width in module.widths],
        'depths': module.blocks,
        'layer_type': module.block,
        'hidden_act': 'relu',
        'contrastive_jax': {'features': 'pooler_output.flatten(1)'},
    }
    return config, _resnet_arrays(tables.HF_RESNET, module, params), ''


def _hf_towers(
    weights: Weights, kind: str
) -> tuple[tuple[dict[str, Any], Arrays], dict[str, Any], str] | None:
    """`((text_config, arrays), more of the config, model_type)` where transformers has the pair."""
    found = weights.encoders
    scalars = names.flatten(found['similarity'][0]) if 'similarity' in found else {}
    if 'text' not in found or 'text_projection' not in found or 'logit_scale' not in scalars:
        return None
    d = weights.config.inputs.text
    sizes = {'vocabulary': d.vocabulary, 'length': d.length}
    module = config_lib.build('models', weights.config.text, 'text', **sizes)
    config = {
        'vocab_size': module.vocabulary,
        'max_position_embeddings': module.length,
        **_hf_blocks(module),
    }
    arrays = names.write(
        names.expand(tables.HF_TEXT, _places(module)), names.flatten(found['text'][0])
    )
    text_linear = names.flatten(found['text_projection'][0])
    width = text_linear['linear1/kernel'].shape[1]
    if (kind, module.causal, module.pool, module.padding) == (
        'clip_vision_model',
        True,
        'last',
        None,
    ):
        if 'image_projection' not in found or 'linear1/bias' in text_linear:
            return None
        family = families.HF_CLIP_FAMILY
        image_linear = names.flatten(found['image_projection'][0])
        arrays |= names.write(family.text_projection, text_linear)
        arrays |= names.write(family.image_projection, image_linear)
        arrays |= {'logit_scale': scalars['logit_scale']}
        if weights.tokenizer:
            config['eos_token_id'] = tokenizer(weights).end
        return (config | {'projection_dim': width}, arrays), {'projection_dim': width}, 'clip'
    if kind == 'siglip_vision_model' and not module.causal and module.padding is not None:
        if 'image_projection' in found or module.pool != 'last' or 'logit_bias' not in scalars:
            return None
        text_linear.setdefault('linear1/bias', np.zeros(width, np.float32))
        arrays |= names.write(families.HF_SIGLIP_FAMILY.text_projection, text_linear)
        arrays |= {name: x.reshape(1) for name, x in scalars.items()}
        config |= {'projection_size': width, 'pad_token_id': module.padding}
        return (config, arrays), {}, 'siglip'
    return None


def _parts(weights: Weights) -> tuple[Any, Arrays, int]:
    """The image encoder's module, its parameters by path with its positions, and the image size."""
    module = config_lib.build('models', weights.config.model, 'model')
    params, stats = weights.encoders['image']
    flat: Arrays = {}
    for tree in (params, stats):
        flat |= {k: v.astype(np.float32) for k, v in names.flatten(tree).items()}
    flat.pop('mask_token', None)  # of no use without masks
    size = weights.config.inputs.size
    if 'position_embedding' in flat:  # learned on views, which may have another size
        size = weights.config.inputs.get('view_size') or size
    elif hasattr(module, 'position'):
        side = size // module.patch
        fixed = sincos2d(side, side, module.width)
        flat['position_embedding'] = np.pad(fixed, ((int(module.cls_token), 0), (0, 0)))[None]
    return module, flat, size


def _places(module: Any) -> list[Mapping[str, int]]:
    return [{'i': i} for i in range(module.depth)]


def _ratio(module: Any) -> float:
    """A number whose product with the width is, rounded down, the hidden width."""
    ratio = module.hidden / module.width
    exact = int(module.width * ratio) == module.hidden
    return ratio if exact else (module.hidden + 0.5) / module.width


def _patch_bias(module: Any, params: Arrays, wanted: bool) -> None:
    """With a bias of the patch projection, or without: the patches' positions take it on."""
    name = 'patch_embedding/bias'
    if wanted:
        params.setdefault(name, np.zeros(module.width, np.float32))
    elif name in params:
        table = params['position_embedding'].copy()
        table[:, int(module.cls_token) :] += params.pop(name)
        params['position_embedding'] = table


def _cls_position(module: Any, params: Arrays) -> None:
    """Positions of the patches alone."""
    if module.cls_token:
        table = params['position_embedding']
        params['cls_token'] = params['cls_token'] + table[:, :1]
        params['position_embedding'] = table[:, 1:]


def _plain_resnet(module: Any, target: str) -> None:
    for key, got, expected in (('stem', module.stem, 'imagenet'), ('pool', module.pool, 'mean')):
        if got != expected:
            raise UserError(
                f'{target}: got a ResNet with {key}={got!r}, which it does not have; expected '
                f'{expected!r}.'
            )


def _resnet_arrays(table: Table, module: Any, params: Arrays) -> Arrays:
    places = [{'s': z + 1, 'z': z, 'i': i} for z, n in enumerate(module.blocks) for i in range(n)]
    arrays = names.write(names.expand(table, places), params)
    averages = [k for k in arrays if k.endswith('running_mean')]
    for name in averages:  # a strict load asks for them
        arrays[name.replace('running_mean', 'num_batches_tracked')] = np.zeros((), np.int64)
    return arrays


def content(value: Any) -> bytes:
    """The bytes of a file of `Files`."""
    if isinstance(value, bytes):
        return value
    if any(isinstance(x, (np.ndarray, np.generic)) for x in value.values()):
        from safetensors.numpy import save

        arrays = {k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in value.items()}
        return save(arrays, {'format': 'pt'})
    return (json.dumps(value, indent=2) + '\n').encode()
