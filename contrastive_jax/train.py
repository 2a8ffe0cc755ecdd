"""The training loop: data, method, restore, step, log, evaluate, save. It names no method.

`run` is the whole program behind `main`. A killed run that is started again goes on with the same
bits: its checkpoint holds the TrainState and the position in the data, and the randomness of a step
depends on the seed and the step alone.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils

from contrastive_jax import STARTED, data, evaluation, figures, inference, parallel
from contrastive_jax import config as config_lib
from contrastive_jax import experiment as experiments
from contrastive_jax.config import Config, UserError
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.experiment import Experiment
from contrastive_jax.inputs import pipeline
from contrastive_jax.state import TrainState
from contrastive_jax.weights import initial
from contrastive_jax.workdir import checkpoint, environment, records, runs


def run(config: Config, workdir: str, *, eval_only: bool = False) -> dict[str, float]:
    """Trains to the end, continuing what the workdir holds, or evaluates its newest checkpoint.

    Args:
        config: `config.base()` filled in by a recipe.
        workdir: a directory or a bucket's URL, created if missing.
        eval_only: evaluate the newest checkpoint, change nothing but its records. Evaluators and
            data may be others than the run's, and the config may be one of evaluators alone (see
            `runs.resolve`); records of other data go to a folder of their own in workdir. A config
            of inputs and evaluators without a method needs no run: it evaluates the baseline.

    Returns:
        The last evaluation's metrics.

    Raises:
        UserError: a mistake in the config, in the data or about the workdir; a loss that is NaN
            or infinite.
    """
    mesh = parallel.make_mesh()
    config_lib.check_keys(config)
    config = runs.resolve(config, workdir, eval_only)
    if not config.method:
        with jax.set_mesh(mesh):
            return _evaluate_baseline(config, workdir, mesh)
    config = initial.complete(config)
    free = config_lib.ROLES['data'] if eval_only else ()
    checkpoint.check(workdir, config.to_dict(), must_exist=eval_only, free=free)
    if config.method.get('locked') and not config.init_from:
        raise UserError(
            'config.method.locked: an encoder that does not learn needs config.init_from.'
        )
    with jax.set_mesh(mesh):
        if eval_only:
            return _evaluate_only(config, workdir, mesh)
        experiment = experiments.open(config, workdir, mesh)
        experiments.check_step(experiment)
        iterator = pipeline.train_iterator(
            experiment.splits['train'],
            experiment.inputs.train,
            batch_size=config.batch_size,
            seed=config.seed,
            bad=experiment.bad,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        # Nothing is written before all that a config can get wrong has been found right.
        checkpoint.claim(workdir, config.to_dict())
        environment.record(workdir, experiment.splits)
        if experiment.inputs.tokenizer and jax.process_index() == 0:
            experiment.inputs.tokenizer.save(workdir)
        experiment.bad.note_skipped(experiment.splits)
        writer = records.Writer(workdir, tensorboard=config.tensorboard)
        checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
        try:
            values = _train(experiment, workdir, iterator, checkpoints, writer)
            iterator.close()
        finally:
            checkpoints.close()
            writer.close()
    return values


def _train(
    experiment: Experiment,
    workdir: str,
    iterator: pipeline.BatchIterator,
    checkpoints: checkpoint.Checkpoints,
    writer: records.Writer,
) -> dict[str, float]:
    config, total = experiment.config, experiment.total_steps
    state = checkpoints.restore(experiment.state, iterator)
    start = 0 if state is None else int(state.step)
    writer.resume(start)
    iterator.start_prefetch()
    if state is None:
        state = experiment.init()
        _overview(state, workdir)
        # The baselines: no network, and an untrained one.
        values = _evaluate(experiment, workdir, None)
        values |= _evaluate(experiment, workdir, state)
        writer.write(0, values)
    elif start >= total:
        logging.info('%s is complete: %d steps', workdir, start)
    else:
        logging.info('continuing %s at step %d of %d', workdir, start, total)

    progress = records.Progress(start, total, config.batch_size)
    values: dict[str, float] = {}
    refresh, epoch = _refresh(experiment), len(experiment.splits['train'])
    with _Stop() as stop:
        pending: list[tuple[int, Any, np.ndarray]] = []
        step = start
        while step < total:
            batch = iterator.next(state)
            state, measured = experiment.step(state, parallel.shard_batch(experiment.mesh, batch))
            step += 1
            if step == start + 1:
                jax.block_until_ready(measured)
                logging.info('first training step after %.1f s', time.monotonic() - STARTED)
            progress.step(step)
            pending.append((step, measured, batch['index']))
            evaluate = step == total or (config.eval_every and step % config.eval_every == 0)
            log = evaluate or step % config.log_every == 0 or step == start + 1
            save = evaluate or step % config.checkpoint_every == 0
            stopping = stop.now(step)
            # One step stays in flight while the host makes the next batch, unless the state that
            # came of it is about to be used.
            while len(pending) > (0 if log or save or stopping else 1):
                measured = _check(experiment, *pending.pop(0))
            if log:
                values = {f'train/{k}': v for k, v in measured.items()}
                values |= progress.values() | {'train/bad_records': experiment.bad.count}
                if tokens := experiment.inputs.tokenizer:
                    values['train/truncated_texts'] = tokens.truncated / max(tokens.seen, 1)
                logging.info(progress.line(values, experiment.bad.count))
                writer.write(step, values)
            with progress.pause():
                if refresh and step * config.batch_size % epoch < config.batch_size:
                    state = refresh(state)
                if step == 1:
                    _show_inputs(experiment, workdir, batch)
                if evaluate:
                    values = _evaluate(experiment, workdir, state)
                    writer.write(step, values)
                    _draw_curves(workdir)
                if save or stopping:
                    checkpoints.save(state, iterator, step, values if evaluate else None)
            if stopping:
                logging.info(
                    'stopped by a signal and saved at step %d; the same command continues', step
                )
                return values
    _summary(workdir, experiment.splits)
    return values


def _refresh(experiment: Experiment) -> Callable[[TrainState], TrainState] | None:
    """The function that renews a method's state after an epoch, if it has one.

    It depends on the state alone, so a continued run repeats it with the same bits.
    """
    if experiment.method.refresh is None:
        return None
    embed, update = experiment.method.refresh
    shardings = jax.tree.map(lambda x: x.sharding, experiment.state.extra)
    update = jax.jit(update, donate_argnums=0, out_shardings=shardings)

    def refresh(state: TrainState) -> TrainState:
        start = time.monotonic()
        embeddings = inference.subject(experiment, state, embed).features('train').x_ND
        key = jax.random.fold_in(jax.random.key(experiment.config.seed ^ 0xE57E9), state.step)
        extra = update(state.extra, embeddings, key, state.step / experiment.total_steps)
        jax.block_until_ready(extra)
        logging.info('step %d: refreshed (%.1f s)', int(state.step), time.monotonic() - start)
        return state._replace(extra=extra)

    return refresh


def _evaluate_only(config: Config, workdir: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Evaluates the newest checkpoint, and the baselines as far as the run has not done so."""
    other = runs.other_data(config, workdir)
    experiment = experiments.open(config, workdir, mesh, other_data=bool(other))
    step = checkpoint.newest(workdir)
    params, extra = checkpoint.weights(workdir, step)
    state = {'params': params, 'extra': extra}
    shardings = jax.tree.map(lambda x: x.sharding, parallel.lay_out(mesh, state, config.fsdp))
    state = TrainState(jnp.int32(step), opt=(), **jax.device_put(state, shardings))
    folder = str(epath.Path(workdir) / other)
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    writer = records.Writer(folder, tensorboard=config.tensorboard)
    try:
        values = _evaluate(experiment, folder, state)
        writer.write(step, values)
        # What the run itself has found at step 0 is good for the evaluators that are its own.
        own = {} if other else runs.config_of(workdir).evals.to_dict()
        given = json.loads(json.dumps(config.evals.to_dict()))
        start = [r for r in records.read(folder) if r['step'] == 0]
        done = {key.split('/')[1] for r in start for key in r if key.startswith('eval/')}
        missing = {
            name: evaluate
            for name, evaluate in experiment.evaluators.items()
            if name not in done or own.get(name) != given[name]
        }
        if missing:
            del state
            writer.write(0, _baselines(experiment._replace(evaluators=missing), folder))
    finally:
        writer.close()
    _summary(folder, experiment.splits)
    return values


def _evaluate_baseline(config: Config, workdir: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Evaluates what needs no network, without a run, in a workdir that is no run's."""
    parallel.check_batch(mesh, config.batch_size)
    evaluators = experiments.build_evaluators(config)
    inputs, splits, bad = experiments.open_data(config, workdir)
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    bad.note_skipped(splits)
    subject = inference.baseline(inputs, splits, mesh, config.batch_size, bad)
    values = _values(subject, evaluators, workdir, None)
    writer = records.Writer(workdir, tensorboard=config.tensorboard)
    writer.resume(0)
    writer.write(0, values)
    writer.close()
    _summary(workdir, splits)
    return values


def _baselines(experiment: Experiment, folder: str) -> dict[str, float]:
    """Metrics of the baseline and of the weights that the run started from."""
    values = _evaluate(experiment, folder, None)
    config, built = experiment.config, experiment
    if config.init_from:
        try:
            start = experiments.pretrained(config)
        except UserError as error:
            logging.warning('the weights that the run started from are gone: %s', error)
            return values
        built = experiments.build(
            config,
            experiment.mesh,
            len(experiment.splits['train']),
            start,
            inputs=experiment.inputs,
            labels=experiment.splits['train'].classes,
        )
        built = experiment._replace(init=built.init, method=built.method)
    return values | _evaluate(built, folder, built.init())


def _evaluate(experiment: Experiment, workdir: str, state: TrainState | None) -> dict[str, float]:
    """Metrics of a state's encoder by every evaluator, or with None of the baseline."""
    e = experiment
    if state is None:
        subject = inference.baseline(e.inputs, e.splits, e.mesh, e.config.batch_size, e.bad)
        return _values(subject, e.evaluators, workdir, None)
    return _values(inference.subject(e, state), e.evaluators, workdir, int(state.step))


def _values(
    subject: Subject,
    evaluators: Mapping[str, evaluation.Evaluate],
    workdir: str,
    step: int | None,
) -> dict[str, float]:
    """Every evaluator's numbers as metrics; without a step they are the baseline's.

    Figures go to the workdir's `pictures/step_<n>/<evaluator>_<name>.png`, or `pictures/baseline`;
    how to print the numbers goes to its measures.json.
    """
    prefix = records.BASELINE if step is None else ''
    folder = epath.Path(workdir) / 'pictures' / ('baseline' if step is None else f'step_{step}')
    values: dict[str, float] = {}
    measures: dict[str, evaluation.Measure] = {}
    for name, evaluate in evaluators.items():
        start = time.monotonic()
        found: dict[str, float] = {}
        drawn: list[str] = []
        for key, value in evaluate(subject):
            if isinstance(value, bytes):
                drawn.append(f'{name}_{key}.png')
                if jax.process_index() == 0:
                    figures.write(value, folder / drawn[-1])
                continue
            if isinstance(value, evaluation.Measure):
                measures[f'{name}/{key}'] = value
            found[f'eval/{name}/{prefix}{key}'] = float(value)
        values |= found
        said = '  '.join([*(f'{k} {v:.4g}' for k, v in found.items()), *drawn])
        what = 'baseline' if step is None else f'step {step}'
        logging.info('%s: %s (%.1f s)', what, said or 'nothing', time.monotonic() - start)
    if jax.process_index() == 0:
        records.describe(workdir, {k: (m.title, m.unit) for k, m in measures.items()})
    return values


def _check(
    experiment: Experiment, step: int, measured: dict[str, jax.Array], index: np.ndarray
) -> dict[str, float]:
    """A step's metrics on the host.

    Raises:
        UserError: loss or gradient is NaN or infinite: which step, learning rate and records.
    """
    rate = float(experiment.schedule(step - 1))
    values = {k: float(v) for k, v in measured.items()} | {'learning_rate': rate}
    if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
        source = experiment.splits['train']
        names = [source.describe(int(i)) for i in index[:8]]
        raise UserError(
            f'step {step}: loss {values["loss"]}, gradient norm {values["grad_norm"]}, at learning '
            f'rate {rate:.3g}. The batch: {", ".join(names)}'
            f'{f" and {len(index) - 8} more" if len(index) > 8 else ""}. Nothing was saved since '
            'the last checkpoint. A lower config.optim.learning_rate, a longer config.optim.warmup '
            'or config.optim.clip_norm may help.'
        )
    return values


def _show_inputs(experiment: Experiment, workdir: str, batch: dict[str, np.ndarray]) -> None:
    """inputs.png: the first records as the encoder is shown them in training."""
    inputs = experiment.inputs
    if jax.process_index() == 0 and inputs.show:
        some = jax.device_put({k: v[:16] for k, v in batch.items()}, jax.local_devices()[0])
        with jax.set_mesh(parallel.make_mesh(jax.local_devices()[:1])):
            floats = jax.jit(inputs.train.device)(jax.random.key(experiment.config.seed), some)
        figures.write(inputs.show(floats), epath.Path(workdir) / 'inputs.png')


def _draw_curves(workdir: str) -> None:
    """curves.png: loss, learning rate and accuracies of the run so far."""
    if jax.process_index() == 0:
        png = figures.training_curves(records.read(workdir), records.described(workdir))
        figures.write(png, epath.Path(workdir) / 'curves.png')


def _overview(state: TrainState, workdir: str) -> None:
    """parameters.txt: every parameter's name, shape and number of values."""
    text = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    if jax.process_index() == 0:
        (epath.Path(workdir) / 'parameters.txt').write_text(text + '\n')
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    logging.info(
        '%s parameters, %.1f MB of state; see parameters.txt',
        f'{count:,}',
        parallel.tree_bytes(state) / 1e6,
    )


def _summary(workdir: str, splits: Mapping[str, data.Source]) -> None:
    if jax.process_index() == 0:
        records.summary(workdir, len(splits.get('test', ())))


class _Stop:
    """Whether SIGTERM (or one Ctrl-C) asks the run to save and end."""

    def __init__(self) -> None:
        self._asked = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> '_Stop':
        def ask(number: int, frame: Any) -> None:
            del frame
            self._asked = True
            signal.signal(number, self._former[number])  # the second one ends at once

        # With several processes JAX's own service tells every one of them the same step to stop at.
        numbers = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
        for number in numbers:
            self._former[number] = signal.signal(number, ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def now(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
