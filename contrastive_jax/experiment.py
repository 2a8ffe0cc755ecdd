"""What a config describes: data, and a training step compiled for the devices that it runs on."""

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from contrastive_jax import augment, data, evals, models, optim, parallel, weights
from contrastive_jax import config as config_lib
from contrastive_jax.config import Config, UserError
from contrastive_jax.data import text
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.method import Batch, Encoders, Method
from contrastive_jax.state import TrainState, make_init, make_step
from contrastive_jax.workdir import checkpoint

# Of what data a config may differ from the run that it evaluates.
LOOKED_AT = ('data.source', 'data.root', 'data.captions', 'data.holdout', 'data.max_bad')


class Parts(NamedTuple):
    """What a config describes, built."""

    splits: dict[str, data.Source]
    bad: BadRecords
    evaluators: dict[str, evals.Evaluate]
    tokenizer: text.Tokenizer | None
    program: 'Program'


class Program(NamedTuple):
    """What a config computes, without the data."""

    method: Method
    schedule: Callable[[int], jax.Array]
    augment: Callable[[jax.Array, Batch], Batch]  # in a step: views from uint8 to float
    total_steps: int
    batch: dict[str, jax.ShapeDtypeStruct]  # of one step
    init: Callable[[], TrainState]
    step: Callable[..., Any]
    state: TrainState  # shapes, dtypes and shardings


def build_parts(
    config: Config, workdir: str | None, mesh: jax.sharding.Mesh, *, other_data: bool = False
) -> Parts:
    """Everything a config names; mistakes in it are found here, before anything runs.

    Args:
        config: as in `train.run`.
        workdir: of the run, which holds its tokenizer. None for one that has none yet.
        mesh: of the devices.
        other_data: whether config.data is not what the run was trained on: it may lack captions,
            and its bad records are not listed in workdir.
    """
    evaluators = {
        name: config_lib.build('evals', {'name': name, **options}, f'config.evals.{name}')
        for name, options in config.evals.items()
    }
    splits = data.open_splits(config.data)
    listed = epath.Path(workdir) / 'bad_records.jsonl' if workdir and not other_data else None
    bad = BadRecords(listed, sum(map(len, splits.values())), config.data.max_bad)
    start, tokenizer = {}, None
    started = workdir is not None and checkpoint.latest(workdir) is not None
    if config.init_from and not started:
        start = pretrained(config)
    if config.text:
        own = workdir if workdir and any(text.files(workdir)) else None
        of_run = 'text' in start and not weights.is_file(config.init_from)
        theirs = config.init_from if of_run else None
        tokenizer = _tokenizer(config, own or theirs, splits['train'], other_data)
    program = build(config, mesh, len(splits['train']), start)
    return Parts(splits, bad, evaluators, tokenizer, program)


def _tokenizer(config: Config, there: str | None, source: Any, other_data: bool) -> text.Tokenizer:
    """The run's, else the one that the config names, else one trained on the captions.

    Raises:
        UserError: no captions; more ids than the text encoder has.
    """
    d = config.data
    if not other_data and not hasattr(source, 'captions'):
        raise UserError(
            f'config.data.source: {d.source!r} has no captions, and config.text reads them; '
            "'captions', 'webdataset' and 'digits:grids' have some."
        )
    options = {'length': d.text.length, 'lower': d.text.lower}
    if path := there or d.text.tokenizer:
        tokenizer = text.open_tokenizer(path, **options)
    else:
        captions = (caption for i in range(len(source)) for caption in data.captions(source, i))
        tokenizer = text.train_tokenizer(captions, vocabulary=d.text.vocabulary, **options)
    if tokenizer.vocabulary > d.text.vocabulary:
        raise UserError(
            f'config.data.text.vocabulary: got {d.text.vocabulary}, but {d.text.tokenizer} has '
            f'{tokenizer.vocabulary} tokens.'
        )
    return tokenizer


def build(
    config: Config, mesh: jax.sharding.Mesh, images: int, start: Encoders | None = None
) -> Program:
    """The training step of a config, and the state that it starts from.

    Args:
        config: as in `train.run`.
        mesh: of the devices that it runs on, or is compiled for.
        images: of an epoch.
        start: weights that the encoders start from; none: random ones.
    """
    d = config.data
    size = config.batch_size
    parallel.check_batch(mesh, size, config.accumulate, config.microbatch)
    if d.get('view_size', 0) < 0:
        raise UserError(f'config.data.view_size: got {d.view_size}; expected 0 or more pixels.')
    side = config_lib.view_size(d)
    method = build_method(config, start or {})
    pictures = augment.make(
        config.augment.to_dict(),
        views=d.views,
        image_size=side,
        mean=d.mean,
        std=d.std,
        local_views=d.local_views,
        local_size=d.local_size,
    )
    total_steps = config.total_steps or round(config.total_epochs * images / size)
    if total_steps < 1:
        raise UserError(
            f'config.total_steps: got {config.total_steps} and config.total_epochs '
            f'{config.total_epochs:g}; expected one of them to be above 0.'
        )
    tx, schedule = config_lib.call(
        optim.make, 'config.optim', **config.optim, total_steps=total_steps, batch_size=size
    )
    split = parallel.rows(mesh)
    shapes = {'views': (d.views, side, side, 3)}
    if d.local_views:
        shapes['local_views'] = (d.local_views, d.local_size, d.local_size, 3)

    def batch(rows: int, pixels: Any) -> dict[str, jax.ShapeDtypeStruct]:
        integer = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
        found = {
            name: jax.ShapeDtypeStruct((rows, *shape), pixels, sharding=split)
            for name, shape in shapes.items()
        }
        if d.text:
            found['text'] = jax.ShapeDtypeStruct((rows, d.text.length), jnp.int32, sharding=split)
        return {**found, 'label': integer, 'index': integer}

    make = make_init(method, tx, config.seed, images)

    def init() -> TrainState:
        return make({k: jnp.zeros(v.shape, v.dtype) for k, v in batch(1, jnp.float32).items()})

    state = parallel.lay_out(mesh, jax.eval_shape(init), config.fsdp)
    if side != d.image_size:
        _check_image_size(method, state, d.image_size, side)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        make_step(method, tx, pictures, config.seed, total_steps, config.accumulate),
        donate_argnums=0,
        in_shardings=(shardings, split),
        out_shardings=(shardings, parallel.replicated(mesh)),
    )
    return Program(
        method,
        schedule,
        pictures,
        total_steps,
        batch(size, jnp.uint8),
        jax.jit(init, out_shardings=shardings),
        step,
        state,
    )


def _check_image_size(method: Method, state: TrainState, size: int, views: int) -> None:
    """Raises UserError unless an encoder that is trained on views can encode images, too."""
    images = {'image': jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)}
    try:
        jax.eval_shape(method.encode, state.params, state.extra, images)
    except flax.errors.ScopeParamShapeError as error:
        raise UserError(
            f'config.data.view_size: got {views}, and config.data.image_size {size}; this encoder '
            f'has parameters for images of one size: {error}'
        ) from None


def build_method(config: Config, start: Encoders) -> Method:
    """The method that a config names, its encoders starting from given weights.

    Args:
        config: as in `train.run`.
        start: see `Method.encoders`; those that are not there start at random.
    """

    def tower(name: str, spec: Config, key: str, **more: Any) -> models.Encoder:
        model = config_lib.build('models', spec, key, remat=config.remat, **more)
        if name in start:
            model = models.Pretrained(model, *start[name], config.init_from)
        if config.microbatch:
            parts = config.batch_size // config.accumulate // config.microbatch
            model = models.Microbatched(model, parts)
        return model

    towers = {}
    if config.text:
        tokens = config.data.text
        if not tokens:
            raise UserError('config.data.text: not set, and config.text needs its vocabulary.')
        sizes = {'vocabulary': tokens.vocabulary, 'length': tokens.length}
        towers['text'] = tower('text', config.text, 'config.text', **sizes)
    image = tower('image', config.model, 'config.model')
    return config_lib.build('methods', config.method, 'config.method', image, **towers)


def pretrained(config: Config) -> Encoders:
    """The encoders of the run or the file that config.init_from names, a run's at its newest.

    A text encoder is of use only with the tokenizer that it was trained with, and where it sees the
    same: it is left out where config.text or config.data.text differ; of a file, too, where
    config.data.text.tokenizer does not name its vocabulary.

    Raises:
        UserError: there is no run in that workdir, or no complete checkpoint of it; what
            `weights.read` raises.
    """
    workdir = config.init_from
    if weights.is_file(workdir):
        read = weights.read(workdir, image_size=config_lib.view_size(config.data))
        theirs, found = read.config, dict(read.encoders)
    else:
        theirs = config_of(workdir)
        state = checkpoint.weights(workdir, checkpoint.newest(workdir))
        found = build_method(theirs, {}).encoders(*state)
    texts = [(c.text.to_dict(), c.data.text.to_dict()) for c in (config, theirs)]
    for spec, _ in texts:
        spec.pop('drop_tokens', None)  # changes how it is trained, not what it reads
    if weights.is_file(workdir) and config.text and config.data.text.tokenizer:
        sizes = [[c.data.text.get(n) for n in ('vocabulary', 'length')] for c in (config, theirs)]
        texts = [
            ({k: v for k, v in spec.items() if k in theirs.text}, size)
            for (spec, _), size in zip(texts, sizes, strict=True)
        ]
    if 'text' in found and texts[0] != texts[1]:
        logging.info('%s: its text encoder reads other texts and is left out', workdir)
        found.pop('text')
    for moment in ('mean', 'std'):
        if tuple(config.data[moment]) != tuple(theirs.data[moment]):
            logging.warning(
                'config.data.%s: got %s, but the encoder of %s was trained with %s',
                *(moment, config.data[moment], workdir, theirs.data[moment]),
            )
    return found


def resolve(config: Config, workdir: str, eval_only: bool) -> Config:
    """A config as it is; or in the place of one that names no method, the config of a run.

    Args:
        config: as in `train.run`, or one of evaluators alone: `evals`, and maybe other data.
        workdir: of the run, whose method, model, views and moments stay what they are.
        eval_only: whether nothing is trained.

    Raises:
        UserError: no run in workdir; evaluators alone, and something to train; a key that is the
            run's and set here.
    """
    if config.method:
        return config
    if not eval_only:
        raise UserError(
            'config.method: not set. A config of evaluators alone looks at what is trained: '
            '--eval_only --workdir=RUN.'
        )
    found, default = config_of(workdir), config_lib.base()
    flat = [checkpoint.flatten(c.to_dict()) for c in (config, default)]
    for key, value in flat[0].items():
        if value != flat[1].get(key) and key not in LOOKED_AT and not key.startswith('evals.'):
            raise UserError(
                f'config.{key}: got {value!r}, but this is for the run in {workdir} to say; '
                f'expected evals, or one of {", ".join(LOOKED_AT)}.'
            )
    keys = [key.removeprefix('data.') for key in LOOKED_AT]
    given = {k: config.data[k] for k in keys if config.data[k] != default.data[k]}
    if 'source' in given:
        given = {'root': '', 'captions': '', **given}
    with found.unlocked():
        found.data.update(given)
        found.evals = config.evals
    return found


def other_data(config: Config, workdir: str) -> str:
    """'on_<source>_<root>' where config's data is not that of the run in workdir, else ''."""
    theirs = config_of(workdir).data
    if all(config.data[k] == theirs[k] for k in ('source', 'root', 'captions', 'holdout')):
        return ''
    parts = config.data.source, epath.Path(config.data.root).name, config.data.captions
    return '_'.join(['on', *(re.sub(r'\W+', '_', p).strip('_') for p in parts if p)])


def complete(config: Config) -> Config:
    """With what only the file of weights knows, where config.init_from is one.

    What config.model and config.text do not set is as the file's encoders have it: activation,
    epsilon, positions, ... What they set stays, and must fit.

    Raises:
        UserError: see `weights.read`.
    """
    if not config.init_from or not weights.is_file(config.init_from):
        return config
    size = config_lib.view_size(config.data)
    theirs = weights.read(config.init_from, image_size=size).config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key in ('model', 'text'):
            ours = config[key].to_dict()
            if ours and theirs[key].get('name') == ours.get('name'):
                # 'size' stands for these, and the shapes are compared later.
                sized = ('width', 'depth', 'heads', 'blocks', 'widths', 'block')
                known = theirs[key].to_dict()
                known = {k: v for k, v in known.items() if 'size' not in ours or k not in sized}
                config[key] = known | ours
    return config


def config_of(workdir: str | os.PathLike) -> Config:
    """That of a run, with the keys that it is older than at their defaults.

    Raises:
        UserError: there is no run in workdir.
    """
    config = config_lib.base()
    with config.unlocked():
        config.update(checkpoint.read(workdir))
    return config
