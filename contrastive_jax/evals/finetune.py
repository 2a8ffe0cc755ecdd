"""Training the whole encoder on with few labels, and the same network from random weights.

B: batch rows, N: records, n: records of a subset, C: classes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from contrastive_jax import evaluation, models, optim, parallel, schedules
from contrastive_jax import inputs as inputs_lib
from contrastive_jax.config import UserError, check_range, each
from contrastive_jax.data import Source
from contrastive_jax.evaluation import Evaluate, few_labels
from contrastive_jax.evaluation.subject import Subject, Weights
from contrastive_jax.inputs import Batch, pipeline
from contrastive_jax.method import Method
from contrastive_jax.methods import supervised
from contrastive_jax.state import TrainState, make_init, make_step

VALIDATION = 0.2  # of the drawn labels, when a learning rate is chosen


def make(
    per_class: Sequence[int] = (10,),
    fractions: Sequence[float] = (),
    draws: int = 3,
    epochs: float = 60.0,
    min_steps: int = 200,
    batch_size: int = 64,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    warmup: float = 0.1,
    mixup: float = 0.0,
    scratch: bool = True,
    seed: int = 0,
    label: str = 'label',
) -> Evaluate:
    """The encoder and a linear classifier on it, trained together by AdamW on few labels.

    It is the method `supervised` on `inputs.tune`: images are cropped and flipped as in the run's
    own training and otherwise left as they are. The learning rate warms up and falls by a cosine.
    Where there are several candidates, each set of labels chooses its own: the one that, trained on
    four fifths of these labels, has the lowest cross-entropy on the rest (with one label a class,
    where nothing can be left out, the middle one). The final training sees all of them; test is
    looked at once.

    Beside it the same network is trained from random weights: the same records, steps and
    candidates, but one learning rate for all layers, as there is nothing in the lower ones to keep.

    Args:
        per_class: numbers of labels per class.
        fractions: shares of the labels, in (0, 1], the same share of every class.
        draws: random subsets each of those is averaged over; the classifiers' own draws.
        epochs: over the subset. SimCLR has 60 with 1 % of ImageNet's labels, 30 with 10 %.
        min_steps: optimiser steps, if those are fewer.
        batch_size: records a step, over all devices; few records come several times in it, each
            time cropped anew.
        learning_rates: candidates for the peak, each above 0.
        weight_decay: at least 0.
        layer_decay: in (0, 1]: each layer learns at this share of the rate of the one above it.
        warmup: share of the steps, in [0, 1).
        mixup: α of Zhang et al. 2018 (arXiv:1710.09412); 0: none.
        scratch: whether to train from random weights, too; once for all evaluations of a process.
        seed: of everything that is drawn.
        label: the one of the data's labels that is predicted.

    Returns:
        `evaluate(subject)`, which yields mean and standard deviation over draws,
        'top1_<n>_per_class', 'top1_<p>_percent', and '..._std' as `linear` does, and
        'scratch_top1_...' from random weights, which is all that an untrained encoder gets. Nothing
        where there is no network. Numbers of devices change no draw, only the order in which sums
        are added up (and, if batch_size does not divide by them, BatchNorm sees some rows twice).

    Raises:
        UserError: a value outside its range.

    Chen et al. 2020 (SimCLR, arXiv:2002.05709), appendix B.5; layer-wise decay as in BEiT (Bao et
    al. 2022, arXiv:2106.08254).
    """
    where = 'config.evals.finetune'
    few_labels.check(where, per_class, draws, fractions)
    if not learning_rates:
        raise UserError(f'{where}.learning_rates: got none; expected numbers above 0.')
    check_range(where, {'epochs': epochs, **each('learning_rates', learning_rates)}, above=0)
    check_range(where, {'min_steps': min_steps, 'batch_size': batch_size}, least=1, whole=True)
    check_range(where, {'weight_decay': weight_decay, 'mixup': mixup}, least=0)
    check_range(where, {'layer_decay': layer_decay}, above=0, most=1)
    check_range(where, {'warmup': warmup}, least=0, below=1)
    few, rates = few_labels.named(per_class, fractions), sorted(learning_rates)
    say = evaluation.missed('fine-tuning')
    from_scratch: dict[tuple[Any, str], list[float]] = {}

    def top1(
        subject: Subject, fit: Fit, weights: Weights | None, rows: np.ndarray, draw: int
    ) -> float:
        label_n = subject.labelled(label=label).label_N[rows]
        stream = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])

        def train(some: np.ndarray, rate: float) -> tuple[Any, Any]:
            steps = max(math.ceil(epochs * len(some) / batch_size), min_steps)
            schedule = np.asarray(schedules.warmup_cosine(rate, steps, warmup)(np.arange(steps)))
            # An iterator wants as many records as a batch has.
            source = subject.labelled_records(np.tile(some, math.ceil(batch_size / len(some))))
            return _train(fit, subject, weights, source, batch_size, schedule, stream)

        rate, held_n = rates[len(rates) // 2], few_labels.held_out(label_n, VALIDATION, seed)
        if len(rates) > 1 and held_n.any():
            held = subject.labelled_records(rows[held_n])
            losses = [_score(fit, subject, *train(rows[~held_n], r), held)[1] for r in rates]
            rate = rates[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]
        hits, _ = _score(fit, subject, *train(rows, rate), subject.splits['test'])
        logging.debug('fine-tuning: draw %d, learning rate %g: %g', draw, rate, hits)
        return hits

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        if subject.weights is None:
            return
        inputs, there = subject.inputs, subject.inputs.tune.shapes
        no_views = '' if 'views' in there else f'the inputs give no views but {", ".join(there)}'
        if reason := subject.missing(label) or no_views:
            say(reason)
            return
        module, label_N = subject.weights.module, subject.labelled(label=label).label_N
        classes = max(len(subject.classes[label]), int(label_N.max()) + 1)
        devices = inputs.tune.device, inputs.eval.device
        fit = Fit(subject.mesh, module, *devices, classes, label, mixup, weight_decay, layer_decay)
        for name, labels in few.items():
            sets = list(enumerate(few_labels.draws(label_N, labels, draws, seed)))
            called, title = evaluation.titled('finetune', label), few_labels.titled(name)
            if not (subject.random and scratch):
                scores = [top1(subject, fit, subject.weights, rows, i) for i, rows in sets]
                yield from few_labels.over_draws(f'top1_{name}', scores, f'{called}, {title}')
            if scratch:
                if (module, name) not in from_scratch:
                    # Of random weights no layer is worth keeping: one rate for all.
                    plain = fit._replace(layer_decay=1.0)
                    scores = [top1(subject, plain, None, rows, i) for i, rows in sets]
                    from_scratch[module, name] = scores
                scores, title = from_scratch[module, name], f'{called}, scratch, {title}'
                yield from few_labels.over_draws(f'scratch_top1_{name}', scores, title)

    return evaluate


class Fit(NamedTuple):
    """All that a program is compiled for: weights, records, rates and seeds are its arguments."""

    mesh: Mesh
    module: Any
    augment: Callable[..., Any]  # inputs.tune.device
    prepare: Callable[..., Any]  # inputs.eval.device
    classes: int
    label: str
    mixup: float
    weight_decay: float
    layer_decay: float

    def method(self, encoder: models.Encoder) -> Method:
        return supervised.make(encoder, classes=self.classes, label=self.label, mixup=self.mixup)

    def optimiser(self, rate: Any) -> optax.GradientTransformation:
        """AdamW at the constant rate 1, its updates times the step's rate, which may be traced."""
        adamw, _ = optim.make(
            name='adamw',
            learning_rate=1.0,
            final_fraction=1.0,
            total_steps=1,
            batch_size=256,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
        )
        return optax.chain(adamw, optax.scale(rate))


def _train(
    fit: Fit,
    subject: Subject,
    weights: Weights | None,
    source: Source,
    batch_size: int,
    rates: np.ndarray,
    seed: int,
) -> tuple[Any, Any]:
    """`(params, extra)` after one step for each learning rate.

    A batch that the devices do not divide is filled up with rows that do not count; every process
    then makes all of it.
    """
    size, processes = fit.mesh.size, jax.process_count()
    fill = batch_size % size
    place = np.arange(-(-batch_size // size) * size).reshape(processes, -1)[jax.process_index()]
    iterator = pipeline.train_iterator(
        source,
        subject.inputs.tune,
        batch_size=batch_size,
        seed=seed,
        bad=subject.bad,
        process_index=0 if fill else jax.process_index(),
        process_count=1 if fill else processes,
    )
    key, example = np.uint32(seed), inputs_lib.blank(subject.inputs.tune, [fit.label])
    given = weights and (weights.params, weights.stats)
    with contextlib.closing(iterator), jax.set_mesh(fit.mesh):
        state, loss = _start(fit, given, example, key), None
        for rate in rates:
            batch = next(iterator)
            if fill:
                batch = {name: x[place % batch_size] for name, x in batch.items()}
                batch[fit.label][place >= batch_size] = -1
            batch, before = parallel.shard_batch(fit.mesh, batch), loss
            state, loss = _step(fit, state, batch, rate, key)
            # One step stays in flight: with dozens XLA's CPU runtime can hang.
            jax.block_until_ready(before)
    return state.params, state.extra


def _score(
    fit: Fit, subject: Subject, params: Any, extra: Any, source: Source
) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) on the labelled records of a source."""
    # The optimiser has no part in it: one program for all of its options.
    classify = functools.partial(_logits, fit._replace(layer_decay=1.0), params, extra)
    logits_NC, labels = subject.through(source, classify)
    labelled_N = labels[fit.label] >= 0
    logits_NC, label_N = logits_NC[labelled_N].astype(np.float64), labels[fit.label][labelled_N]
    chosen_N = label_N[:, None] == np.arange(fit.classes)[None, :]
    with np.errstate(invalid='ignore'):  # of a rate that was too high
        loss_N = np.logaddexp.reduce(logits_NC, axis=1) - np.sum(logits_NC * chosen_N, axis=1)
    return float(np.mean(logits_NC.argmax(1) == label_N)), float(np.mean(loss_N))


@functools.partial(jax.jit, static_argnames='fit')
def _start(fit: Fit, weights: Any, example: Batch, seed: jax.Array) -> TrainState:
    encoder = fit.module
    if weights is not None:
        # Copies, which steps may overwrite.
        params, stats = jax.tree.map(jnp.copy, weights)
        encoder = models.Pretrained(encoder, params, stats, 'this run')
    state = make_init(fit.method(encoder), fit.optimiser(1.0), seed, records=0)(example)
    return jax.lax.with_sharding_constraint(state, parallel.replicated(fit.mesh))


@functools.partial(jax.jit, static_argnames='fit', donate_argnames='state')
def _step(
    fit: Fit, state: TrainState, batch: Batch, rate: jax.Array, seed: jax.Array
) -> tuple[TrainState, jax.Array]:
    method, tx = fit.method(fit.module), fit.optimiser(rate)
    state, metrics = make_step(method, tx, fit.augment, seed, total_steps=1)(state, batch)
    whole = parallel.replicated(fit.mesh)
    return jax.lax.with_sharding_constraint((state, metrics['loss']), whole)


@functools.partial(jax.jit, static_argnames='fit')
def _logits(fit: Fit, params: Any, extra: Any, batch: Batch) -> jax.Array:
    encode = fit.method(fit.module).encode
    logits_BC = encode(params, extra, fit.prepare(None, batch))['logits']
    return jax.lax.with_sharding_constraint(logits_BC, parallel.rows(fit.mesh))
