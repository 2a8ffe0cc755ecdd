"""The training loop: data, method, restore, step, log, evaluate, save. It names no method.

`run` is the whole program behind `main`. A killed run that is started again goes on with the same
bits: its checkpoint holds the TrainState and the position in the data, and the randomness of a step
depends on the seed and the step alone.
"""

import json
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils

from contrastive_jax import STARTED, experiment, figures, inference, parallel
from contrastive_jax import config as config_lib
from contrastive_jax.config import Config, UserError
from contrastive_jax.experiment import Parts
from contrastive_jax.inputs import pipeline
from contrastive_jax.state import TrainState
from contrastive_jax.workdir import checkpoint, environment, records


def run(config: Config, workdir: str, *, eval_only: bool = False) -> dict[str, float]:
    """Trains to the end, continuing what the workdir holds, or evaluates its newest checkpoint.

    Args:
        config: `config.base()` filled in by a recipe.
        workdir: a directory or a bucket's URL, created if missing.
        eval_only: evaluate the newest checkpoint, change nothing but its records. Evaluators and
            data may be others than the run's, and the config may be one of evaluators alone (see
            `program.resolve`); records of other data go to a folder of their own in workdir.

    Returns:
        The last evaluation's metrics.

    Raises:
        UserError: a mistake in the config, in the data or about the workdir; a loss that is NaN
            or infinite.
    """
    mesh = parallel.make_mesh()
    for key in config:
        if key not in config_lib.base():
            raise config_lib.unknown('key', key, config_lib.base(), 'config')
    config = experiment.complete(experiment.resolve(config, workdir, eval_only))
    free = experiment.LOOKED_AT if eval_only else ()
    checkpoint.check(workdir, config.to_dict(), must_exist=eval_only, free=free)
    if config.method.get('locked') and not config.init_from:
        raise UserError(
            'config.method.locked: an encoder that does not learn needs config.init_from.'
        )
    with jax.set_mesh(mesh):
        if eval_only:
            return _evaluate_only(config, workdir, mesh)
        parts = experiment.build_parts(config, workdir, mesh)
        iterator = _iterator(config, parts)
        # Nothing is written before all that a config can get wrong has been found right.
        checkpoint.claim(workdir, config.to_dict())
        environment.record(workdir, parts.splits)
        if parts.tokenizer and jax.process_index() == 0:
            parts.tokenizer.save(workdir)
        for source in parts.splits.values():
            for record, reason in getattr(source, 'skipped', ()):
                parts.bad.note(record, reason)
        writer = records.Writer(workdir, tensorboard=config.tensorboard)
        checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
        try:
            values = _train(config, workdir, mesh, parts, iterator, checkpoints, writer)
            iterator.close()
        finally:
            checkpoints.close()
            writer.close()
    return values


def _train(
    config: Config,
    workdir: str,
    mesh: jax.sharding.Mesh,
    parts: Parts,
    iterator: pipeline.BatchIterator,
    checkpoints: checkpoint.Checkpoints,
    writer: records.Writer,
) -> dict[str, float]:
    state = checkpoints.restore(parts.program.state, iterator)
    start = 0 if state is None else int(state.step)
    writer.resume(start)
    iterator.start_prefetch()
    if state is None:
        state = parts.program.init()
        _overview(state, workdir)
        # The baselines: raw pixels and the untrained encoder.
        values = _evaluate(config, workdir, parts, mesh, None)
        values |= _evaluate(config, workdir, parts, mesh, state)
        writer.write(0, values)
    elif start >= parts.program.total_steps:
        logging.info('%s is complete: %d steps', workdir, start)
    else:
        logging.info('continuing %s at step %d of %d', workdir, start, parts.program.total_steps)

    progress = records.Progress(start, parts.program.total_steps, config.batch_size)
    values: dict[str, float] = {}
    refresh, images = _refresh(config, parts, mesh), len(parts.splits['train'])
    with _Stop() as stop:
        pending: list[tuple[int, Any, np.ndarray]] = []
        step = start
        while step < parts.program.total_steps:
            batch = next(iterator)
            state, measured = parts.program.step(state, parallel.shard_batch(mesh, batch))
            step += 1
            if step == start + 1:
                jax.block_until_ready(measured)
                logging.info('first training step after %.1f s', time.monotonic() - STARTED)
            progress.step(step)
            pending.append((step, measured, batch['index']))
            evaluate = step == parts.program.total_steps or (
                config.eval_every and step % config.eval_every == 0
            )
            log = evaluate or step % config.log_every == 0 or step == start + 1
            save = evaluate or step % config.checkpoint_every == 0
            stopping = stop.now(step)
            # One step stays in flight while the host makes the next batch, unless the state that
            # came of it is about to be used.
            while len(pending) > (0 if log or save or stopping else 1):
                measured = _check(parts, *pending.pop(0))
            if log:
                values = {f'train/{k}': v for k, v in measured.items()}
                values |= progress.values() | {'train/bad_records': parts.bad.count}
                if tokens := parts.tokenizer:
                    values['train/truncated_texts'] = tokens.truncated / max(tokens.seen, 1)
                logging.info(progress.line(values, parts.bad.count))
                writer.write(step, values)
            with progress.pause():
                if refresh and step * config.batch_size % images < config.batch_size:
                    state = refresh(state)
                if step == 1:
                    _draw_views(config, workdir, parts, batch)
                if evaluate:
                    values = _evaluate(config, workdir, parts, mesh, state)
                    writer.write(step, values)
                    _draw_curves(workdir)
                if save or stopping:
                    checkpoints.save(state, iterator, step, values if evaluate else None)
            if stopping:
                logging.info(
                    'stopped by a signal and saved at step %d; the same command continues', step
                )
                return values
    _summary(workdir, parts)
    return values


def _iterator(config: Config, parts: Parts) -> pipeline.BatchIterator:
    d = config.data
    return pipeline.train_iterator(
        parts.splits['train'],
        batch_size=config.batch_size,
        views=d.views,
        image_size=config_lib.view_size(d),
        crop=d.crop.to_dict(),
        seed=config.seed,
        bad=parts.bad,
        local_views=d.local_views,
        local_size=d.local_size,
        local_scale=d.local_scale,
        tokenize=parts.tokenizer,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _refresh(
    config: Config, parts: Parts, mesh: jax.sharding.Mesh
) -> Callable[[TrainState], TrainState] | None:
    """What a method does after an epoch with the embeddings of the training split, or None.

    It depends on the state alone, so a continued run repeats it with the same bits.
    """
    method, shapes = parts.program.method, parts.program.state
    if method.refresh is None:
        return None
    embed, update = method.refresh
    shardings = jax.tree.map(lambda x: x.sharding, shapes.extra)
    update = jax.jit(update, donate_argnums=0, out_shardings=shardings)

    def refresh(state: TrainState) -> TrainState:
        start = time.monotonic()
        embeddings = inference.encoder(config, parts, mesh, state, embed).features('train').x_ND
        key = jax.random.fold_in(jax.random.key(config.seed ^ 0xE57E9), state.step)
        progress = state.step / parts.program.total_steps
        extra = update(state.extra, embeddings, key, progress)
        jax.block_until_ready(extra)
        logging.info('step %d: refreshed (%.1f s)', int(state.step), time.monotonic() - start)
        return state._replace(extra=extra)

    return refresh


def _evaluate_only(config: Config, workdir: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Evaluates the newest checkpoint, and the baselines as far as the run has not done so."""
    other = experiment.other_data(config, workdir)
    parts = experiment.build_parts(config, workdir, mesh, other_data=bool(other))
    step = checkpoint.newest(workdir)
    params, extra = checkpoint.weights(workdir, step)
    weights = {'params': params, 'extra': extra}
    shardings = jax.tree.map(lambda x: x.sharding, parallel.lay_out(mesh, weights, config.fsdp))
    state = TrainState(jnp.int32(step), opt=(), **jax.device_put(weights, shardings))
    folder = str(epath.Path(workdir) / other)
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    writer = records.Writer(folder, tensorboard=config.tensorboard)
    try:
        values = _evaluate(config, folder, parts, mesh, state)
        writer.write(step, values)
        # What the run itself has found at step 0 is good for the evaluators that are its own.
        own = {} if other else experiment.config_of(workdir).evals.to_dict()
        given = json.loads(json.dumps(config.evals.to_dict()))
        start = [r for r in records.read(folder) if r['step'] == 0]
        done = {key.split('/')[1] for r in start for key in r if key.startswith('eval/')}
        missing = {
            name: evaluate
            for name, evaluate in parts.evaluators.items()
            if name not in done or own.get(name) != given[name]
        }
        if missing:
            del state
            few = parts._replace(evaluators=missing)
            writer.write(0, _baselines(config, folder, few, mesh))
    finally:
        writer.close()
    _summary(folder, parts)
    return values


def _baselines(
    config: Config, folder: str, parts: Parts, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """What the evaluators say of raw pixels and of the weights that the run started from."""
    values = _evaluate(config, folder, parts, mesh, None)
    built = parts.program
    if config.init_from:
        try:
            start = experiment.pretrained(config)
        except UserError as error:
            logging.warning('the weights that the run started from are gone: %s', error)
            return values
        built = experiment.build(config, mesh, len(parts.splits['train']), start)
    return values | _evaluate(config, folder, parts._replace(program=built), mesh, built.init())


def _evaluate(
    config: Config, workdir: str, parts: Parts, mesh: jax.sharding.Mesh, state: TrainState | None
) -> dict[str, float]:
    """What every evaluator says of a state's encoder, or with None of the raw pixels.

    Pictures go to the workdir's `pictures/step_<n>/<evaluator>_<name>.png`, or `pictures/pixels`.
    """
    encoder = inference.encoder(config, parts, mesh, state)
    prefix = records.PIXELS if state is None else ''
    place = 'pixels' if state is None else f'step_{int(state.step)}'
    folder = epath.Path(workdir) / 'pictures' / place
    values: dict[str, float] = {}
    for name, evaluate in parts.evaluators.items():
        start = time.monotonic()
        found: dict[str, float] = {}
        drawn: list[str] = []
        for key, value in evaluate(encoder):
            if isinstance(value, bytes):
                drawn.append(f'{name}_{key}.png')
                if jax.process_index() == 0:
                    figures.write(value, folder / drawn[-1])
            else:
                found[f'eval/{name}/{prefix}{key}'] = value
        values |= found
        what = 'raw pixels' if state is None else f'step {int(state.step)}'
        said = '  '.join([*(f'{k} {v:.4g}' for k, v in found.items()), *drawn])
        logging.info('%s: %s (%.1f s)', what, said or 'nothing', time.monotonic() - start)
    return values


def _check(
    parts: Parts, step: int, measured: dict[str, jax.Array], index: np.ndarray
) -> dict[str, float]:
    """A step's metrics on the host.

    Raises:
        UserError: loss or gradient is NaN or infinite: which step, learning rate and images.
    """
    rate = float(parts.program.schedule(step - 1))
    values = {k: float(v) for k, v in measured.items()} | {'learning_rate': rate}
    if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
        source = parts.splits['train']
        names = [source.describe(int(i)) for i in index[:8]]
        raise UserError(
            f'step {step}: loss {values["loss"]}, gradient norm {values["grad_norm"]}, at learning '
            f'rate {rate:.3g}. The batch: {", ".join(names)}'
            f'{f" and {len(index) - 8} more" if len(index) > 8 else ""}. Nothing was saved since '
            'the last checkpoint. A lower config.optim.learning_rate, a longer config.optim.warmup '
            'or config.optim.clip_norm may help.'
        )
    return values


def _draw_views(config: Config, workdir: str, parts: Parts, batch: dict[str, np.ndarray]) -> None:
    """views.png: what the encoder is shown of the first images."""
    if jax.process_index() == 0:
        some = jax.device_put({k: v[:16] for k, v in batch.items()}, jax.local_devices()[0])
        with jax.set_mesh(parallel.make_mesh(jax.local_devices()[:1])):
            floats = jax.jit(parts.program.augment)(jax.random.key(config.seed), some)
        mean, std = np.array(config.data.mean), np.array(config.data.std)
        shown = {k: np.asarray(v) * std + mean for k, v in floats.items() if k.endswith('views')}
        path = epath.Path(workdir) / 'views.png'
        figures.write(
            figures.views_grid(shown['views'], local_BLHWC=shown.get('local_views')), path
        )


def _draw_curves(workdir: str) -> None:
    """curves.png: loss, learning rate and accuracies of the run so far."""
    if jax.process_index() == 0:
        png = figures.training_curves(records.read(workdir))
        figures.write(png, epath.Path(workdir) / 'curves.png')


def _overview(state: TrainState, workdir: str) -> None:
    """parameters.txt: every parameter's name, shape and size."""
    text = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    if jax.process_index() == 0:
        (epath.Path(workdir) / 'parameters.txt').write_text(text + '\n')
    count = sum(x.size for x in jax.tree.leaves(state.params))
    logging.info(
        '%s parameters, %.1f MB of state; see parameters.txt',
        f'{count:,}',
        parallel.tree_bytes(state) / 1e6,
    )


def _summary(workdir: str, parts: Parts) -> None:
    if jax.process_index() == 0:
        records.summary(workdir, len(parts.splits.get('test', ())))


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
