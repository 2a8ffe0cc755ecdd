"""JSON files beside a weights file, which say what no shape tells: timm's config.json, Hugging
Face's config.json and preprocessor_config.json, OpenCLIP's open_clip_config.json.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from contrastive_jax.config import UserError

# Theirs -> ours.
ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'quick_gelu': 'quick_gelu',
    'gelu_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
}
RESAMPLE = {2: 'bilinear', 3: 'bicubic'}  # Pillow's numbers
TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'tokenizer.txt.gz')
OPENAI_TOKENIZER = 'bpe_simple_vocab_16e6.txt.gz'


class Settings(NamedTuple):
    """Options of the image and the text encoder, keys of `config.inputs`, and who said so."""

    model: dict[str, Any]
    text: dict[str, Any]
    data: dict[str, Any]
    files: list[str]


def read(path: epath.Path) -> Settings:
    """Reads the JSON files beside a weights file; `<its stem>.json` replaces config.json.

    Raises:
        UserError: one is not JSON, or has an activation that we do not have.
    """
    found = Settings({}, {}, {}, [])
    own = path.with_suffix('.json')
    for file in (
        own if own.exists() else path.parent / 'config.json',
        path.parent / 'preprocessor_config.json',
        path.parent / 'open_clip_config.json',
    ):
        if not file.exists():
            continue
        try:
            said = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f'{file}: not JSON ({error}).') from error
        if isinstance(said, Mapping):
            found.files.append(file.name)
            _add(found, said, str(file))
    return found


def tokenizer(path: epath.Path) -> epath.Path | None:
    """A vocabulary beside a weights file."""
    files = (path.parent / name for name in (*TOKENIZERS, OPENAI_TOKENIZER))
    return next((file for file in files if file.exists()), None)


def _add(found: Settings, said: Mapping[str, Any], file: str) -> None:
    if 'pretrained_cfg' in said:  # timm
        _timm(found, said)
    elif 'model_cfg' in said:  # OpenCLIP
        _open_clip(found, said)
    elif 'image_mean' in said:
        _preprocessor(found.data, said)
    else:
        found.model.update(_hugging_face(said.get('vision_config', said), file))
        found.text.update(_hugging_face(said.get('text_config', {}), file))


def _hugging_face(said: Mapping[str, Any], file: str) -> dict[str, Any]:
    keys = {'num_attention_heads': 'heads', 'layer_norm_eps': 'epsilon'}
    out = {ours: said[theirs] for theirs, ours in keys.items() if theirs in said}
    act = said.get('hidden_act')
    if act in ACTIVATIONS:
        out['activation'] = ACTIVATIONS[act]
    elif act is not None and 'num_attention_heads' in said:
        raise UserError(f'{file}: got hidden_act {act!r}; expected one of {tuple(ACTIVATIONS)}.')
    return out


def _preprocessor(data: dict[str, Any], said: Mapping[str, Any]) -> None:
    _standardisation(data, said.get('image_mean'), said.get('image_std'))
    if said.get('do_normalize') is False:
        data |= {'mean': (0.0,) * 3, 'std': (1.0,) * 3}
    size, crop = said.get('size'), said.get('crop_size')
    size = {'height': size} if isinstance(size, int) else size or {}
    crop = {'height': crop} if isinstance(crop, int) else crop or {}
    side = size.get('shortest_edge', size.get('height'))
    if said.get('do_center_crop') and crop.get('height'):
        data['size'] = crop['height']
        data['crop_fraction'] = min(1.0, crop['height'] / (side or crop['height']))
    elif side:
        data |= {'size': side, 'crop_fraction': 1.0}
        if pct := said.get('crop_pct'):
            data['crop_fraction'] = pct
    if said.get('resample') in RESAMPLE:
        data['interpolation'] = RESAMPLE[said['resample']]


def _timm(found: Settings, said: Mapping[str, Any]) -> None:
    cfg, args = said['pretrained_cfg'], said.get('model_args') or {}
    data = found.data
    _standardisation(data, cfg.get('mean'), cfg.get('std'))
    data |= {
        ours: cfg[theirs]
        for theirs, ours in (('crop_pct', 'crop_fraction'), ('interpolation', 'interpolation'))
        if theirs in cfg
    }
    if size := cfg.get('input_size'):
        data['size'] = size[-1]
    if 'quickgelu' in str(said.get('architecture')):
        found.model['activation'] = 'quick_gelu'
    if args.get('act_layer') in ACTIVATIONS:
        found.model['activation'] = ACTIVATIONS[args['act_layer']]
    if 'num_heads' in args:
        found.model['heads'] = args['num_heads']


def _open_clip(found: Settings, said: Mapping[str, Any]) -> None:
    model, preprocess = said['model_cfg'], said.get('preprocess_cfg') or {}
    _standardisation(found.data, preprocess.get('mean'), preprocess.get('std'))
    if 'interpolation' in preprocess:
        found.data['interpolation'] = preprocess['interpolation']
    if 'timm_model_name' not in model.get('vision_cfg', {}):
        activation = 'quick_gelu' if model.get('quick_gelu') else 'gelu'
        found.model['activation'] = found.text['activation'] = activation
    for name, options in (('vision_cfg', found.model), ('text_cfg', found.text)):
        tower = model.get(name, {})
        if 'heads' in tower:
            options['heads'] = tower['heads']
        elif 'head_width' in tower and 'width' in tower:
            options['heads'] = tower['width'] // tower['head_width']


def _standardisation(data: dict[str, Any], mean: Any, std: Any) -> None:
    if mean and std:
        data |= {'mean': tuple(mean), 'std': tuple(std)}
