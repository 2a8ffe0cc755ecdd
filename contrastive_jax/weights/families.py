"""The encoders of others that we read and write: what they call their parameters.

`detect` tells from a file's names which one it is; `image_options` and `text_options` tell from its
shapes what encoder of ours it is.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from contrastive_jax.config import UserError
from contrastive_jax.weights import names, tables
from contrastive_jax.weights.names import Table

Shapes = Mapping[str, tuple[int, ...]]

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
OPENAI = {
    'mean': (0.48145466, 0.4578275, 0.40821073),
    'std': (0.26862954, 0.26130258, 0.27577711),
}
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}

# What is no part of an encoder, or of no use once it is trained.
IGNORED = re.compile(
    r'(head|heads|fc|classifier|pooler|predictor|projector|decoder\w*|head_dist)\.'
    r'|((.*\.)?(mask_token|logit_scale|logit_bias|position_ids|num_batches_tracked))$'
)


class Family(NamedTuple):
    """Encoders that share names and conventions.

    Attributes:
        name: for people.
        marker: the end of a name that every such file has, and no file of the families before it.
        model: ours, a file of models/.
        image: table of the image encoder.
        root: what the marker's name begins with where the file holds more than the image encoder.
        text: table of the text encoder; None: there is none.
        image_projection, text_projection: of the linear layers into the space that both share.
        options: of the model, which no shape tells.
        text_options: of the text encoder.
        data: what its images are normalised with and resized by.
        antialias: whether its authors resample positions with a low-pass filter.
        aliases: other names in files of the same kind.
    """

    name: str
    marker: str
    model: str
    image: Table
    root: str = ''
    text: Table | None = None
    image_projection: Table = {}  # noqa: RUF012
    text_projection: Table = {}  # noqa: RUF012
    options: Mapping[str, Any] = {}
    text_options: Mapping[str, Any] = {}
    data: Mapping[str, Any] = IMAGENET
    antialias: bool = False
    aliases: Mapping[str, str] = {}


_CLIP = {'activation': 'quick_gelu', 'epsilon': 1e-5}
_CLIP_TEXT = {**_CLIP, 'causal': True, 'pool': 'last'}
_SIGLIP = {'activation': 'gelu_tanh', 'epsilon': 1e-6}
_SIGLIP_TEXT = {**_SIGLIP, 'causal': False, 'pool': 'last', 'padding': 1}
_EXACT = {'activation': 'gelu', 'epsilon': 1e-6}
_CROP = {'crop_fraction': 0.875}

HF_CLIP_FAMILY = Family(
    'CLIP of Hugging Face',
    'pre_layrnorm.weight',
    'vit',
    tables.HF_CLIP,
    root='vision_model.',
    text=tables.HF_TEXT,
    image_projection={'linear1': 'visual_projection'},
    text_projection={'linear1': 'text_projection'},
    options=_CLIP,
    text_options=_CLIP_TEXT,
    data=OPENAI,
)
HF_SIGLIP_FAMILY = Family(
    'SigLIP of Hugging Face',
    'embeddings.patch_embedding.bias',
    'vit',
    tables.HF_SIGLIP,
    root='vision_model.',
    text=tables.HF_TEXT,
    text_projection={'linear1': 'text_model.head'},
    options=_SIGLIP,
    text_options=_SIGLIP_TEXT,
    data=HALF,
)
HF_VIT_FAMILY = Family(
    'ViT of Hugging Face',
    'encoder.layer.0.layernorm_before.weight',
    'vit',
    tables.HF_VIT,
    options={**_EXACT, 'epsilon': 1e-12},
    data=HALF,
)
HF_DINOV2_FAMILY = Family(
    'DINOv2 of Hugging Face',
    'encoder.layer.0.layer_scale1.lambda1',
    'vit',
    tables.HF_DINOV2,
    options=_EXACT,
)
TIMM_FAMILY = Family(
    'ViT of timm',
    'blocks.0.attn.qkv.weight',
    'vit',
    tables.TIMM,
    options=_EXACT,
    antialias=True,
    aliases={'register_tokens': 'reg_token'},  # DINOv2's own
)
TIMM_RESNET_FAMILY = Family(
    'ResNet of timm and torchvision',
    'layer1.0.conv1.weight',
    'resnet',
    tables.TIMM_RESNET,
    data=IMAGENET | _CROP,
)
HF_RESNET_FAMILY = Family(
    'ResNet of Hugging Face',
    'encoder.stages.0.layers.0.layer.0.convolution.weight',
    'resnet',
    tables.HF_RESNET,
    data=IMAGENET | _CROP,
)
# A marker must not be the end of a name in files of those after it.
FAMILIES = (
    Family(
        'CLIP of OpenAI and OpenCLIP',
        'visual.transformer.resblocks.0.attn.in_proj_weight',
        'vit',
        tables.OPENAI_CLIP,
        text=tables.openai_text(''),
        image_projection={'linear1/kernel': 'visual.proj'},
        text_projection={'linear1/kernel': 'text_projection'},
        options=_CLIP,
        text_options=_CLIP_TEXT,
        data=OPENAI,
    ),
    Family(
        'SigLIP of OpenCLIP',
        'visual.trunk.blocks.0.attn.qkv.weight',
        'vit',
        {k: names.renamed(v, lambda n: f'visual.trunk.{n}') for k, v in tables.TIMM.items()},
        text=tables.openai_text('text.'),
        text_projection={'linear1': 'text.text_projection'},
        options=_EXACT,
        text_options={**_SIGLIP_TEXT, 'activation': 'gelu'},
        data=HALF,
        antialias=True,
    ),
    HF_CLIP_FAMILY,
    HF_SIGLIP_FAMILY,
    HF_DINOV2_FAMILY,
    HF_VIT_FAMILY,
    TIMM_FAMILY,
    HF_RESNET_FAMILY,
    TIMM_RESNET_FAMILY,
)


def detect(origin: str, shapes: Shapes) -> tuple[Family, str]:
    """The family of a file, and what comes before its marker.

    Raises:
        UserError: none of them, or several encoders in one file.
    """
    for family in FAMILIES:
        ends = [n.removesuffix(family.marker) for n in shapes if n.endswith(family.marker)]
        found = [p for p in ends if p in ('', family.root) or p.endswith('.')]
        # DINO's teacher is what its authors evaluate, MoCo's base encoder likewise.
        better = [p for p in found if 'teacher' in p or 'base_encoder' in p]
        found = better if len(found) > 1 and better else found
        if len(found) > 1:
            raise UserError(f'{origin}: holds several encoders, {sorted(found)}; keep one of them.')
        if found:
            return family, found[0]
    known = ', '.join(family.name for family in FAMILIES)
    some = ', '.join(sorted(shapes)[:5])
    raise UserError(f'{origin}: has names of no encoder that is known: {some}, ... Known: {known}.')


class _Shapes:
    """Shapes of a file by the names of ours."""

    def __init__(self, table: Table, shapes: Shapes):
        self.table, self.shapes = table, shapes

    def __call__(self, path: str, **place: int) -> tuple[int, ...] | None:
        """That of theirs; None: it is not there."""
        rows = names.expand(self.table, [{'i': 0, 's': 1, 'z': 0} | place])
        found = names.find(rows, path.format(**place))
        return None if found is None else self.shapes.get(names.names_of(found[0])[0])

    def count(self, path: str, **place: int) -> int:
        """The number of blocks."""
        i = 0
        while self(path, **place, i=i):
            i += 1
        return i


def image_options(family: Family, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the image encoder in a file, as `config.model` has them.

    Args:
        family: of the file.
        shapes: of its arrays.
        given: options that are known otherwise; 'heads' is 64 channels each where it is not.
    """
    at = _Shapes(family.image, shapes)
    options = {'name': family.model, **family.options}
    options |= {**_OPTIONS[family.model](at), **given}
    if at('cls_token') and options['pool'] != 'cls':
        options['cls_token'] = True
    return options


def seeing(family: Family, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keys of `config.data` by which images are usually normalised and resized."""
    if options.get('norm_pre'):
        return OPENAI
    return HALF if options.get('pool') == 'map' else family.data


def _vit(at: _Shapes) -> dict[str, Any]:
    width, _, patch, _ = at('patch_embedding/kernel') or (0,) * 4
    has_cls = at('cls_token') is not None
    options = {
        **_sizes(at, width),
        'patch': patch,
        'pool': 'map' if at('pool/probe') else 'cls' if has_cls else 'mean',
        'position': 'learned',
    }
    # Only what is not the default, so that what is written of it stays short.
    if at('norm_pre/scale'):
        options |= {'norm_pre': True, 'epsilon': 1e-5}  # as CLIP everywhere
    if not at('patch_embedding/bias'):
        options['patch_bias'] = False
    if at('block{i}/layer_scale1', i=0):
        options['layer_scale'] = 1e-5
    if registers := at('register_tokens'):
        options['registers'] = registers[1]
    return options


def _sizes(at: _Shapes, width: int) -> dict[str, Any]:
    hidden, _ = at('block{i}/mlp1/kernel', i=0) or (0, 0)
    sizes = {'width': width, 'depth': at.count('block{i}/norm1/scale')}
    heads = {} if width % 64 else {'heads': width // 64}
    return {**sizes, **heads, 'mlp_ratio': hidden / max(width, 1)}


def _resnet_options(at: _Shapes) -> dict[str, Any]:
    blocks, widths = [], []
    while count := at.count('stage{s}_block{i}/conv1/kernel', s=len(blocks) + 1, z=len(blocks)):
        stage = {'s': len(blocks) + 1, 'z': len(blocks), 'i': 0}
        widths.append((at('stage{s}_block{i}/conv1/kernel', **stage) or (0,))[0])
        blocks.append(count)
    bottleneck = at('stage{s}_block{i}/conv3/kernel', s=1, z=0, i=0)
    kind = 'bottleneck' if bottleneck else 'basic'
    return {'widths': tuple(widths), 'blocks': tuple(blocks), 'block': kind, 'stem': 'imagenet'}


_OPTIONS = {'vit': _vit, 'resnet': _resnet_options}


def text_options(family: Family, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `image_options`, for `config.text`, with 'vocabulary' and 'length'; None: no texts."""
    if family.text is None:
        return None
    at = _Shapes(family.text, shapes)
    table = at('token_embedding')
    if table is None:
        return None
    length = (at('position_embedding') or (0,))[0]
    sizes = {'vocabulary': table[0], 'length': length, **_sizes(at, table[1])}
    return {'name': 'transformer', **family.text_options, **sizes, **given}


def rows(family: Family, options: Mapping[str, Any]) -> dict[str, names.Theirs]:
    """The image encoder's table with a row for each block."""
    if 'blocks' in options:
        places = [
            {'s': z + 1, 'z': z, 'i': i}
            for z, count in enumerate(options['blocks'])
            for i in range(count)
        ]
    else:
        places = [{'i': i} for i in range(options['depth'])]
    return names.expand(family.image, places)
