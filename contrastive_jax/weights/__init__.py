"""Encoders in one file: those of others, whose names and shapes say what they are, and our own.

A file is read into `Weights`, whatever wrote it; `encoder` makes of them the function that a method
has as its `encode`. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from contrastive_jax import config as config_lib
from contrastive_jax import models
from contrastive_jax.config import Config, UserError
from contrastive_jax.data import text
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Batch, Encode, Encoders, Tree
from contrastive_jax.networks.chain import Chain
from contrastive_jax.networks.pair import SIMILARITY
from contrastive_jax.weights import beside, families, names, positions
from contrastive_jax.weights.files import SUFFIXES, File, is_file

KEY = 'contrastive_jax'  # of our own files' metadata
TOWERS = ('image', 'image_projection', 'text', 'text_projection', 'similarity')
# Of config.inputs: an encoder needs these to see images as it did in training.
SEEING = ('size', 'mean', 'std', 'crop_fraction')


class Weights(NamedTuple):
    """An encoder of images, maybe with one of texts.

    Attributes:
        config: 'model', 'text' ({} without) and of 'inputs' what it needs to see.
        encoders: as `Method.encoders`.
        origin: the file's or the run's name.
        tokenizer: (file name, content) of the vocabulary; None: there is none.
    """

    config: Config
    encoders: Encoders
    origin: str
    tokenizer: tuple[str, bytes] | None = None


def read(
    path: str | os.PathLike,
    *,
    image_size: int | None = None,
    model: Mapping[str, Any] | None = None,
) -> Weights:
    """The encoder in a file; what it is and how it sees is logged.

    Args:
        path: .safetensors or .npz: one that `export` has written, or one with the names of timm,
            torchvision, transformers, OpenCLIP, or of DINO, DINOv2, MAE and MoCo v3.
        image_size: side of the images that it will see; learned positions are resampled for it.
            None: what the JSON beside the file says, else what it was trained with.
        model: options of the image encoder (`config.model`) that replace what was found: no shape
            tells 'activation', 'epsilon' and 'heads' (64 channels each, unless JSON says).

    Raises:
        UserError: no such file, a pickle, damaged; names of no known encoder; missing, unexpected
            or misshapen arrays, the first of which are listed.
    """
    if not is_file(path):
        raise UserError(f'{os.fspath(path)}: expected a name that ends in one of {SUFFIXES}.')
    file = File(path)
    if KEY in file.metadata:
        return _ours(file, image_size, model or {})
    family, prefix = families.detect(file.origin, file.shapes)
    left_out = file.rename(_names(family, prefix))
    said = beside.read(epath.Path(path))
    options = families.image_options(family, file.shapes, said.model | dict(model or {}))
    texts = families.text_options(family, file.shapes, said.text)
    _check_heads(file.origin, options, texts)
    data = {**families.seeing(family, options), **said.data}
    if 'size' not in data or image_size:
        data['size'] = image_size or _native(file, family, options)
    if data.get('interpolation') not in ('bicubic', 'bilinear'):
        data['interpolation'] = 'bicubic'

    arrays: Mapping[str, Any] = file
    if 'depth' in options:
        arrays = _with_positions(file, family, options, data['size'])
    found: dict[str, dict[str, np.ndarray]] = {}
    report = names.Report(file.origin, family.name)
    image = config_lib.build('models', options, 'model')
    table = families.rows(family, options)
    pixels = jnp.zeros((1, data['size'], data['size'], 3))
    found['image'] = report.read(table, arrays, _shapes_of(image, pixels))
    if texts:
        spec = dict(texts)
        module = config_lib.build('models', spec, 'text')
        ids = jnp.zeros((1, spec['length']), jnp.int32)
        rows = names.expand(family.text or {}, [{'i': i} for i in range(spec['depth'])])
        found['text'] = report.read(rows, arrays, _shapes_of(module, ids))
    for tower, rows in (
        ('image_projection', family.image_projection),
        ('text_projection', family.text_projection),
    ):
        shapes = _projection(rows, arrays) if tower.partition('_')[0] in found else {}
        if shapes:
            found[tower] = report.read(rows, arrays, shapes)
    scalars = {n: np.asarray(file[n], np.float32) for n in SIMILARITY if n in file and texts}
    if scalars:
        found['similarity'] = {n: x.reshape(()) for n, x in scalars.items()}
    extra = [n for n in file if n not in report.used and not families.IGNORED.match(n)]
    report.finish(extra)
    ignored = left_out + len(file) - len(report.used)
    config = _config(options, texts, data)
    logging.info(
        '%s: %s (%s), %d arrays, %d that are no part of the encoder left out%s',
        *(file.origin, family.name, _short(options), len(report.used), ignored),
        ' and a text encoder' if texts else '',
    )
    where = f'by {", ".join(said.files)}' if said.files else 'as is usual for its kind'
    logging.info(
        '%s: images of %d pixels, mean %s, std %s, %s (%s); of others the centre square',
        *(file.origin, data['size'], data['mean'], data['std'], data['interpolation'], where),
    )
    beside_it = beside.tokenizer(epath.Path(path)) if texts else None
    content = (beside_it.name, beside_it.read_bytes()) if beside_it else None
    return Weights(config, {k: _trees(v) for k, v in found.items()}, file.origin, content)


def _names(family: families.Family, prefix: str) -> Callable[[str], str | None]:
    """From names in a file to those of the family's tables; None: of something else."""
    inside = prefix.endswith(family.root)
    base = prefix.removesuffix(family.root) if inside else prefix

    def change(name: str) -> str | None:
        if not name.startswith(base):
            return None
        name = name.removeprefix(base)
        name = family.aliases.get(name, name)
        return name if inside else family.root + name

    return change


def _check_heads(origin: str, options: Mapping[str, Any], texts: Mapping[str, Any] | None) -> None:
    for key, found in (('model', options), ('text', texts)):
        if found and 'depth' in found and 'heads' not in found:
            raise UserError(
                f'{origin}: a width of {found["width"]} does not say how many heads there are; say '
                f"it by a config.json beside the file, or load(path, {key}={{'heads': ...}})."
            )


def _native(file: File, family: families.Family, options: Mapping[str, Any]) -> int:
    """Side of the images that learned positions are for; 224 where there are none."""
    if 'depth' not in options:
        return 224
    table = _table(file, family)
    cls, registers = int('cls_token' in _there(file, family)), options.get('registers', 0)
    return positions.split(file.origin, table, cls, registers)[1] * options['patch']


def _there(file: File, family: families.Family) -> list[str]:
    rows = {k: v for k, v in family.image.items() if '{' not in k}
    return [k for k, v in rows.items() if names.names_of(v)[0] in file]


def _table(file: File, family: families.Family) -> np.ndarray:
    name = names.names_of(family.image['position_embedding'])[0]
    if name not in file:
        raise UserError(f'{file.origin}: read as {family.name}, but missing: {name}')
    x = np.asarray(file[name], np.float32)
    return x.reshape(-1, x.shape[-1])


def _with_positions(
    file: File, family: families.Family, options: Mapping[str, Any], image_size: int
) -> dict[str, Any]:
    """The file's arrays with positions for images of this size."""
    patch, there = options['patch'], _there(file, family)
    if image_size % patch:
        raise UserError(
            f'{file.origin}: got image_size={image_size}; expected a multiple of patch={patch}.'
        )
    table, cls = _table(file, family), int('cls_token' in there)
    count = options.get('registers', 0)
    before, _ = positions.split(file.origin, table, cls, count)
    registers = np.zeros((0, table.shape[1]), np.float32)
    extra = {}
    if count:
        name = names.names_of(family.image['register_tokens'])[0]
        registers = np.asarray(file[name], np.float32).reshape(count, -1)
    table, registers = positions.adapt(
        table,
        registers,
        cls=cls,
        before=before,
        side=image_size // patch,
        antialias=family.antialias,
    )
    if count:
        extra[name] = registers[None]
    extra[names.names_of(family.image['position_embedding'])[0]] = table[None]
    return _Over(file, extra)


class _Over(dict):
    """Some arrays in place of a file's."""

    def __init__(self, file: File, changed: Mapping[str, np.ndarray]):
        super().__init__(changed)
        self._file = file

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._file.shapes

    def __missing__(self, name: str) -> np.ndarray:
        return self._file[name]


def _shapes_of(module: Any, x: jax.Array) -> dict[str, tuple[int, ...]]:
    params, stats = jax.eval_shape(lambda: models.init(module, jax.random.key(0), x))
    shapes = jax.tree.map(lambda leaf: np.broadcast_to(0, leaf.shape), (params, stats))
    return {path: x.shape for tree in shapes for path, x in names.flatten(tree).items()}


def _projection(rows: names.Table, arrays: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of ours, where the file has the linear layer."""
    shapes = {}
    for path in ('linear1/kernel', 'linear1/bias'):
        found = names.find(rows, path)
        if found and (name := names.names_of(found[0])[0]) in arrays:
            shape = np.shape(arrays[name])
            shapes[path] = shape[::-1] if found[1] else shape
    return shapes


def _trees(flat: Mapping[str, np.ndarray]) -> tuple[Tree, Tree]:
    stats = {k: v for k, v in flat.items() if k.rpartition('/')[2] in ('mean', 'var')}
    params = {k: v for k, v in flat.items() if k not in stats}
    return names.unflatten(params), names.unflatten(stats)


def _short(options: Mapping[str, Any]) -> str:
    return ', '.join(
        f'{k}={v:g}' if isinstance(v, float) else f'{k}={v}' for k, v in options.items()
    )


def _config(
    model: Mapping[str, Any], texts: Mapping[str, Any] | None, data: Mapping[str, Any]
) -> Config:
    config = config_lib.base()
    config.model = dict(model)
    config.inputs = config_lib.images()
    config.inputs.update({key: data[key] for key in SEEING if key in data})
    config.inputs.crop.interpolation = data['interpolation']
    if texts:
        sizes = {key: texts[key] for key in ('vocabulary', 'length')}
        config.text = {k: v for k, v in texts.items() if k not in sizes}
        reads = {'tokenizer': '', **sizes, 'lower': False}
        config.inputs.update({'name': 'captions', 'text': reads})
    return config


def _ours(file: File, image_size: int | None, model: Mapping[str, Any]) -> Weights:
    said = config_lib.updated(json.loads(file.metadata[KEY]))
    config = config_lib.base()
    config.update({'model': said['model'] | dict(model), 'text': said['text']})
    config.inputs = config_lib.images()
    with config.inputs.unlocked():
        config.inputs.update(said['inputs'])
    if image_size:
        config.inputs.size = image_size
    encoders = {}
    for tower in TOWERS:
        found: list[Tree] = []
        for kind in ('params', 'stats'):
            prefix = f'{tower}/{kind}/'
            flat = {n.removeprefix(prefix): file[n] for n in file if n.startswith(prefix)}
            found.append(names.unflatten(flat))
        if found[0] or found[1]:
            encoders[tower] = found[0], found[1]
    tokenizer = None
    if said.get('tokenizer'):
        tokenizer = said['tokenizer'], file['tokenizer'].tobytes()
    logging.info('%s: %s', file.origin, _short(said['model']))
    return Weights(config, encoders, file.origin, tokenizer)


def described(weights: Weights) -> dict[str, Any]:
    """The keys of a config that say what an encoder is and how it sees, as JSON can hold them."""
    inputs = weights.config.inputs
    seeing = {key: inputs[key] for key in SEEING}
    seeing['crop'] = {'interpolation': inputs.crop.interpolation}
    texts = weights.config.text.to_dict() if 'text' in weights.encoders else {}
    if texts:
        seeing |= {'name': 'captions', 'text': inputs.text.to_dict()}
    return json.loads(
        json.dumps({'model': weights.config.model.to_dict(), 'text': texts, 'inputs': seeing})
    )


def content(weights: Weights) -> bytes:
    """The bytes of a .safetensors file that `read` gives back, bit for bit."""
    from safetensors.numpy import save

    arrays = {}
    for tower in TOWERS:
        for kind, tree in zip(('params', 'stats'), weights.encoders.get(tower, ()), strict=False):
            for path, x in names.flatten(tree).items():
                arrays[f'{tower}/{kind}/{path}'] = np.ascontiguousarray(x).reshape(x.shape)
    said = described(weights)
    if weights.tokenizer:
        said['tokenizer'], vocabulary = weights.tokenizer
        arrays['tokenizer'] = np.frombuffer(vocabulary, np.uint8)
    return save(arrays, {KEY: json.dumps(said)})


def encoder(weights: Weights) -> tuple[Encode, tuple[Tree, Tree]]:
    """`(encode, (params, extra))`, as a method's: see `Method.encode`."""
    config, found = weights.config, weights.encoders
    networks: dict[str, Chain] = {}
    params: dict[str, Tree] = {}
    extra: dict[str, Tree] = {}
    sizes = {key: config.inputs.text[key] for key in ('vocabulary', 'length') if config.text}
    for tower, spec, more in (('image', config.model, {}), ('text', config.text, sizes)):
        if tower not in found:
            continue
        module = config_lib.build('models', spec, tower, **more)
        of_encoder, of_linear = found[tower], found.get(f'{tower}_projection')
        heads = {}
        params[tower], extra[tower] = {'encoder': of_encoder[0]}, {'encoder': of_encoder[1]}
        if of_linear:
            linear = of_linear[0]['linear1']
            heads['projection'] = MLP(
                1, linear['kernel'].shape[1], layers=1, last_bias='bias' in linear
            )
            params[tower]['projection'], extra[tower]['projection'] = of_linear
        networks[tower] = Chain(module, **heads)

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        tower = 'text' if 'text' in batch else 'image'
        x = batch[tower]
        out, _ = networks[tower](params[tower], extra[tower], x, train=False)
        embedding = out.get('projection', out['encoder'])
        if tower == 'text':
            return {'embedding': embedding}
        shared = {'embedding': embedding} if {'text', 'image_projection'} & found.keys() else {}
        return {'features': out['encoder'], **shared, **out['named']}

    return encode, (params, extra)


def tokenizer(weights: Weights) -> text.Tokenizer:
    """That of the text encoder.

    Raises:
        UserError: no text encoder, or no vocabulary was found for it.
    """
    if 'text' not in weights.encoders:
        raise UserError(f'{weights.origin}: has no text encoder.')
    if weights.tokenizer is None:
        expected = ', '.join((*beside.TOKENIZERS, beside.OPENAI_TOKENIZER))
        raise UserError(
            f'{weights.origin}: there is no vocabulary beside it; expected one of {expected}.'
        )
    d = weights.config.inputs.text
    name, content = weights.tokenizer
    return text.read_tokenizer(name, content, length=d.length, lower=d.lower)
