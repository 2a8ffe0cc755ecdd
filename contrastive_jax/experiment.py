"""An experiment: everything a config names, built, and a training step compiled for its devices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from contrastive_jax import config as config_lib
from contrastive_jax import data, evaluation, models, optim, parallel, weights
from contrastive_jax import inputs as inputs_lib
from contrastive_jax.config import Config, UserError
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.inputs import Inputs
from contrastive_jax.method import ENCODER, Encoders, Method, Tree
from contrastive_jax.state import TrainState, make_init, make_step
from contrastive_jax.weights import initial
from contrastive_jax.workdir import checkpoint, runs


class Start(NamedTuple):
    """Weights that a run starts from, in the place of random ones.

    Attributes:
        encoders: see `Method.encoders`.
        params, stats: of another run, of whose modules config.init_modules names some.
    """

    encoders: Encoders
    params: Tree = None
    stats: Tree = None


class Experiment(NamedTuple):
    """Everything a config names, built.

    Attributes:
        config, mesh: that it was built from.
        inputs: how its data become batches.
        method: what it learns.
        schedule: step -> learning rate.
        total_steps: of the whole run.
        batch: shapes of one step's batch.
        init: `() -> TrainState`, jitted.
        step: `(state, batch) -> (state, metrics)`, jitted; the state is donated.
        state: shapes, dtypes and shardings of the state.
        splits, bad, evaluators: of its data; empty of a plan.
    """

    config: Config
    mesh: jax.sharding.Mesh
    inputs: Inputs
    method: Method
    schedule: Callable[[int], jax.Array]
    total_steps: int
    batch: inputs_lib.Shapes
    init: Callable[[], TrainState]
    step: Any
    state: TrainState
    splits: Mapping[str, data.Source]
    bad: BadRecords
    evaluators: Mapping[str, evaluation.Evaluate]


def open(
    config: Config, workdir: str | None, mesh: jax.sharding.Mesh, *, other_data: bool = False
) -> Experiment:
    """Everything a config names; mistakes in it are found here, before anything runs.

    Args:
        config: as in `train.run`.
        workdir: of the run, which keeps what its inputs have learned. None for one that has none.
        mesh: of the devices.
        other_data: whether config.data is not what the run was trained on: it may lack what only
            training reads, and its bad records are not listed in workdir.
    """
    evaluators = build_evaluators(config)
    inputs, splits, bad = open_data(config, workdir, other_data=other_data)
    start = None
    started = workdir is not None and checkpoint.latest(workdir) is not None
    if config.init_modules and not config.init_from:
        raise UserError(
            f'config.init_modules: got {tuple(config.init_modules)}, but config.init_from, the run '
            'that they come from, is not set.'
        )
    if config.init_from and not started:
        start = pretrained(config)
    if inputs.prepare:
        # A text encoder that comes from another run reads by that run's vocabulary.
        came = (*start.encoders, *config.init_modules) if start else ()
        of_run = 'text' in came and not weights.is_file(config.init_from)
        folders = [folder for folder in (workdir, config.init_from if of_run else None) if folder]
        inputs = inputs.prepare(None if other_data else splits['train'], folders)
    built = build(
        config, mesh, len(splits['train']), start, inputs=inputs, labels=splits['train'].classes
    )
    return built._replace(splits=splits, bad=bad, evaluators=evaluators)


def open_data(
    config: Config, workdir: str | None, *, other_data: bool = False
) -> tuple[Inputs, dict[str, data.Source], BadRecords]:
    """The inputs that a config names, not yet prepared; its splits; the register of bad records.

    Args:
        config, workdir, other_data: as in `open`.
    """
    splits = data.open_splits(config.data)
    listed = epath.Path(workdir) / 'bad_records.jsonl' if workdir and not other_data else None
    bad = BadRecords(listed, sum(map(len, splits.values())), config.data.max_bad)
    inputs = build_inputs(config)
    if not other_data:
        inputs_lib.check(config.inputs.name, inputs, splits['train'], config.data.source)
    return inputs, splits, bad


def build_evaluators(config: Config) -> dict[str, evaluation.Evaluate]:
    """The evaluators that a config names."""
    return {
        name: config_lib.build('evals', {'name': name, **options}, f'config.evals.{name}')
        for name, options in config.evals.items()
    }


def build_inputs(config: Config) -> Inputs:
    """The inputs that a config names, not yet prepared."""
    return config_lib.build('inputs', config.inputs, 'config.inputs')


def build(
    config: Config,
    mesh: jax.sharding.Mesh,
    records: int,
    start: Start | None = None,
    *,
    inputs: Inputs | None = None,
    labels: Sequence[str] | Mapping[str, Any] = ('label',),
) -> Experiment:
    """The training step of a config, and the state that it starts from, without the data.

    Args:
        config: as in `train.run`.
        mesh: of the devices that it runs on, or is compiled for.
        records: of an epoch.
        start: weights to start from; None: random ones.
        inputs: prepared ones; None: as the config names them, good for their shapes.
        labels: names of those that the data has.

    Raises:
        UserError: a mistake in the config; a method that reads of a batch what inputs do not give.
    """
    rows = config.batch_size
    parallel.check_batch(mesh, rows, config.accumulate, config.microbatch)
    inputs = inputs or build_inputs(config)
    method = build_method(config, start.encoders if start else {})
    if start and config.init_modules:
        method = graft(method, config.init_modules, start, config.init_from)
    total_steps = config.total_steps or round(config.total_epochs * records / rows)
    if total_steps < 1:
        raise UserError(
            f'config.total_steps: got {config.total_steps} and config.total_epochs '
            f'{config.total_epochs:g}; expected one of them to be above 0.'
        )
    tx, schedule = config_lib.call(
        optim.make, 'config.optim', **config.optim, total_steps=total_steps, batch_size=rows
    )
    split = parallel.rows(mesh)
    batch = inputs_lib.batch_shapes(inputs.train, labels, rows, split)
    make = make_init(method, tx, config.seed, records)

    def init() -> TrainState:
        return make(inputs_lib.blank(inputs.train, labels))

    state = parallel.lay_out(mesh, _reading(config, batch, jax.eval_shape, init), config.fsdp)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        make_step(method, tx, inputs.train.device, config.seed, total_steps, config.accumulate),
        donate_argnums=0,
        in_shardings=(shardings, split),
        out_shardings=(shardings, parallel.replicated(mesh)),
    )
    return Experiment(
        config,
        mesh,
        inputs,
        method,
        schedule,
        total_steps,
        batch,
        jax.jit(init, out_shardings=shardings),
        step,
        state,
        splits={},
        bad=BadRecords(None, 0),
        evaluators={},
    )


def check_step(experiment: Experiment) -> None:
    """Traces the training step, which its first call then need not do.

    Raises:
        UserError: the method reads of a batch what the inputs do not give, or cannot encode what
            evaluators will see.
    """
    e = experiment
    _reading(e.config, e.batch, e.step.trace, e.state, e.batch)
    _check_encodes(e.method, e.state, e.inputs)


def _reading(config: Config, batch: inputs_lib.Shapes, trace: Callable, *args: Any) -> Any:
    """`trace(*args)`, a key that it misses in the batch reported as the inputs'."""
    try:
        return trace(*args)
    except KeyError as error:
        (key,) = error.args or ('',)
        if key in batch or not isinstance(key, str):
            raise
        raise UserError(
            f'config.method: {config.method.name!r} reads {key!r} of a batch, which the inputs '
            f'{config.inputs.name!r} do not give; they give {", ".join(map(repr, batch))}.'
        ) from error


def _check_encodes(method: Method, state: TrainState, inputs: Inputs) -> None:
    """Raises UserError unless what trains on training batches can encode evaluation's, too."""
    given = inputs_lib.blank(inputs.eval)
    try:
        jax.eval_shape(method.encode, state.params, state.extra, given)
    except flax.errors.ScopeParamShapeError as error:
        shapes = {
            name: list(x.shape) for t in (inputs.train, inputs.eval) for name, x in t.shapes.items()
        }
        raise UserError(
            f'config.inputs: training and evaluation give {shapes}; this encoder has parameters '
            f'for one of them alone: {error}'
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
            records = config.batch_size // config.accumulate
            model = models.Microbatched(model, records // config.microbatch, records)
        return model

    towers = {}
    if config.text:
        tokens = config.inputs.get('text')
        if not tokens:
            raise UserError('config.inputs.text: not set, and config.text needs its vocabulary.')
        known = {'vocabulary': tokens.vocabulary, 'length': tokens.length}
        towers['text'] = tower('text', config.text, 'config.text', **known)
    encoder = tower(ENCODER, config.model, 'config.model')
    return config_lib.build('methods', config.method, 'config.method', encoder, **towers)


def graft(method: Method, names: Sequence[str], start: Start, origin: str) -> Method:
    """A method some of whose modules start from another run's.

    A copy that the method's own state has of a module, such as a target network's, is one of the
    given weights, too.

    Args:
        method: of the run.
        names: of entries in the parameters of both.
        start: parameters and averages of the other run.
        origin: its workdir, for errors.

    Raises:
        UserError: (at init) there is no such module here or there, or it has other shapes.
    """

    def init(key: jax.Array, batch: inputs_lib.Batch, records: int) -> tuple[Tree, Tree]:
        params, extra = method.init(key, batch, records)
        here, there = (params, extra.get('stats', {})), (start.params, start.stats)
        for name in names:
            for which, run in (('this run', params), (origin, start.params)):
                if name not in run:
                    raise config_lib.unknown(f'module of {which}', name, run, 'config.init_modules')
        ours, theirs = ([{n: t.get(n, {}) for n in names} for t in run] for run in (here, there))
        if differ := models.differences(ours, theirs):
            raise UserError(f'config.init_modules: those of {origin} do not fit; {differ}')

        def grafted(tree: Tree) -> Tree:
            if not isinstance(tree, Mapping):
                return tree
            return {name: one(name, x) if name in names else grafted(x) for name, x in tree.items()}

        def one(name: str, x: Tree) -> Tree:
            for mine, given in zip(ours, theirs, strict=True):
                if jax.tree.leaves(x) and not models.differences([x], [mine[name]]):
                    return _where_equal(x, mine[name], given[name])
            return grafted(x)

        return {**params, **jax.tree.map(jnp.asarray, theirs[0])}, grafted(extra)

    return method._replace(init=init)


def _where_equal(x: Tree, mine: Tree, given: Tree) -> Tree:
    """The given arrays if x has the values of mine in all of them, else x."""
    same = jnp.stack(jax.tree.leaves(jax.tree.map(jnp.array_equal, x, mine))).all()
    return jax.tree.map(lambda a, b: jnp.where(same, b, a), x, given)


def pretrained(config: Config) -> Start:
    """The weights of the run or the file that config.init_from names, a run's at its newest.

    A text encoder is of use only with the tokenizer that it was trained with, and where it sees the
    same: it is left out where config.text or config.inputs.text differ; of a file, too, where
    config.inputs.text.tokenizer does not name its vocabulary.

    Raises:
        UserError: there is no run in that workdir, or no complete checkpoint of it; modules of a
            file; what `weights.read` raises.
    """
    workdir = config.init_from
    if config.init_modules and weights.is_file(workdir):
        raise UserError(
            f'config.init_modules: got {tuple(config.init_modules)}, but {workdir} is a file of '
            'weights, which has encoders alone; expected ().'
        )
    if weights.is_file(workdir):
        read = initial.read_for(config)
        theirs, found = read.config, dict(read.encoders)
        _compare_statistics(config, theirs)
    else:
        theirs = runs.config_of(workdir)
        params, extra = checkpoint.weights(workdir, checkpoint.newest(workdir))
        _compare_statistics(config, theirs)
        if config.init_modules:
            return Start({}, params, extra.get('stats', {}))
        found = build_method(theirs, {}).encoders(params, extra)
    reads = [c.inputs.get('text', {}) for c in (config, theirs)]
    texts = [(c.text.to_dict(), dict(r)) for c, r in zip((config, theirs), reads, strict=True)]
    for spec, _ in texts:
        spec.pop('drop_tokens', None)  # changes how it is trained, not what it reads
    if weights.is_file(workdir) and config.text and reads[0].get('tokenizer'):
        limits = [[r.get(n) for n in ('vocabulary', 'length')] for r in reads]
        texts = [
            ({k: v for k, v in spec.items() if k in theirs.text}, limit)
            for (spec, _), limit in zip(texts, limits, strict=True)
        ]
    if 'text' in found and texts[0] != texts[1]:
        logging.info('%s: its text encoder reads other texts and is left out', workdir)
        found.pop('text')
    return Start(found)


def _compare_statistics(config: Config, theirs: Config) -> None:
    for key in ('mean', 'std'):
        ours, own = (c.inputs.get(key) for c in (config, theirs))
        if ours and own and tuple(ours) != tuple(own):
            logging.warning(
                'config.inputs.%s: got %s, but the encoder of %s was trained with %s',
                *(key, ours, config.init_from, own),
            )
