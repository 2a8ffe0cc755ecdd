"""Training the whole encoder on with few labels, and the same network from random weights.

B: batch rows, n: rows of a subset, H W: image, D: features, C: classes.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from contrastive_jax import augment, evaluation, models, optim, parallel
from contrastive_jax.config import UserError
from contrastive_jax.evals.linear import held_out
from contrastive_jax.evaluation import Evaluate, few_labels
from contrastive_jax.evaluation.subject import RECORDS, Subject
from contrastive_jax.inputs import geometry

READ = 512  # records that are decoded at a time
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
    memory: float = 4.0,
    seed: int = 0,
) -> Evaluate:
    """The encoder and a linear classifier on it, trained together by AdamW on few labels.

    Images are cropped and flipped as in the run's own training (config.inputs.crop) and otherwise
    left as they are. The learning rate warms up and falls by a cosine. Where there are several
    candidates, each set of labels chooses its own: the one that, trained on four fifths of these
    labels, has the lowest cross-entropy on the rest (with one label a class, where nothing can be
    left out, the middle one). The final training sees all of them; test is looked at once.

    Beside it the same network is trained from random weights: the same images, steps and
    candidates, but one learning rate for all layers, as there is nothing in the lower ones to keep.

    Args:
        per_class: numbers of labels per class.
        fractions: shares of the labels, in (0, 1], the same share of every class.
        draws: random subsets each of those is averaged over; the classifiers' own draws.
        epochs: over the subset. SimCLR has 60 with 1 % of ImageNet's labels, 30 with 10 %.
        min_steps: optimiser steps, if those are fewer.
        batch_size: images a step, over all devices; few images come several times in it, each time
            cropped anew.
        learning_rates: candidates for the peak, each above 0.
        weight_decay: at least 0.
        layer_decay: in (0, 1]: each layer learns at this share of the rate of the one above it.
        warmup: share of the steps, in [0, 1).
        mixup: α of Zhang et al. 2018 (arXiv:1710.09412); 0: none.
        scratch: whether to train from random weights, too; once for all evaluations of a process.
        memory: GiB of each host's for decoded pictures: a subset must fit; test images that do
            not are decoded again for every training.
        seed: of everything that is drawn.

    Returns:
        `evaluate(subject)`, which yields mean and standard deviation over draws,
        'top1_<n>_per_class', 'top1_<p>_percent', and '..._std' as `linear` does, and
        'scratch_top1_...' from random weights, which is all that an untrained encoder gets. Nothing
        for raw pixels. Numbers of devices change no draw, only the order in which sums are added up
        (and, if batch_size does not divide by them, BatchNorm sees some images twice).

    Raises:
        UserError: a value outside its range; (when evaluating) a subset that does not fit.

    Chen et al. 2020 (SimCLR, arXiv:2002.05709), appendix B.5; layer-wise decay as in BEiT (Bao et
    al. 2022, arXiv:2106.08254).
    """
    where = 'config.evals.finetune'
    few_labels.check(where, per_class, draws, fractions)
    for name, value, fine, expected in (
        ('epochs', epochs, epochs > 0, 'above 0'),
        ('min_steps', min_steps, min_steps >= 1, 'at least 1'),
        ('batch_size', batch_size, batch_size >= 1, 'at least 1'),
        ('learning_rates', learning_rates, min(learning_rates, default=0) > 0, 'numbers above 0'),
        ('weight_decay', weight_decay, weight_decay >= 0, 'at least 0'),
        ('layer_decay', layer_decay, 0 < layer_decay <= 1, 'in (0, 1]'),
        ('warmup', warmup, 0 <= warmup < 1, 'in [0, 1)'),
        ('mixup', mixup, mixup >= 0, 'at least 0'),
        ('memory', memory, memory > 0, 'above 0'),
    ):
        if not fine:
            raise UserError(f'{where}.{name}: got {value}, expected {expected}.')
    few, limit = few_labels.named(per_class, fractions), memory * 2**30
    rates = sorted(learning_rates)
    say = evaluation.missed('fine-tuning')
    from_scratch: dict[tuple[Any, str], list[float]] = {}

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        if subject.weights is None or subject.views is None:
            return
        if reason := subject.missing():
            say(reason)
            return
        label_N, test = subject.labelled().label_N, _Test(subject, limit)
        module, views = subject.weights.module, subject.views
        fit = Fit(
            subject.mesh,
            module,
            max(len(subject.classes), int(label_N.max()) + 1),
            views.mean,
            views.std,
            weight_decay,
            layer_decay,
            mixup,
        )
        crop = geometry.crop_options(views.crop)

        def top1(fit: Fit, tower: evals.Tower | None, x: Any, label_n: np.ndarray, draw: int):
            def train(kept_n: np.ndarray, rate: float) -> Any:
                count = int(kept_n.sum())
                steps = max(math.ceil(epochs * count / batch_size), min_steps)
                schedule = np.asarray(optim.warmup_cosine(rate, steps, warmup)(np.arange(steps)))
                some = Subset(x[kept_n], label_n[kept_n], crop, batch_size, (seed, draw))
                return _train(fit, tower, some, schedule)

            rate, held_n = rates[len(rates) // 2], held_out(label_n, VALIDATION, seed)
            if len(rates) > 1 and held_n.any():
                found = [
                    _score(fit, train(~held_n, r), [(x[held_n], label_n[held_n])])[1] for r in rates
                ]
                rate = rates[int(np.argmin(np.nan_to_num(found, nan=np.inf)))]
            every = np.ones(len(label_n), bool)
            hits, _ = _score(fit, train(every, rate), test)
            logging.debug('fine-tuning: draw %d, learning rate %g: %g', draw, rate, hits)
            return hits

        for name, labels in few.items():
            pretrained: list[float] = []
            starts: list[tuple[evals.Tower | None, Fit, list[float]]] = []
            if not (subject.random and scratch):
                starts.append((subject.weights, fit, pretrained))
            if scratch and (module, name) not in from_scratch:
                from_scratch[module, name] = []
                # Of random weights no layer is worth keeping: one rate for all.
                plain = fit._replace(layer_decay=1.0)
                starts.append((None, plain, from_scratch[module, name]))
            for draw, rows in enumerate(few_labels.draws(label_N, labels, draws, seed)):
                x = _read(subject, rows, limit, where)
                for tower, this, scores in starts:
                    scores.append(top1(this, tower, x, label_N[rows], draw))
            if pretrained:
                yield from few_labels.over_draws(f'top1_{name}', pretrained)
            if scratch:
                yield from few_labels.over_draws(f'scratch_top1_{name}', from_scratch[module, name])

    return evaluate


class Fit(NamedTuple):
    """What is compiled: all but images, rates and keys."""

    mesh: Mesh
    module: Any
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weight_decay: float
    layer_decay: float
    mixup: float

    def optimiser(self) -> optax.GradientTransformation:
        """AdamW at the constant rate 1: its updates times a step's rate are those of that rate."""
        return optim.make(
            name='adamw',
            learning_rate=1.0,
            final_fraction=1.0,
            total_steps=1,
            batch_size=256,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
        )[0]


class Subset(NamedTuple):
    """Labelled pictures in random order and random crops, batch by batch without an end.

    Position g = 0, 1, ... runs over the rows of all batches: a row's image and crop depend on the
    seed and g alone.
    """

    image_nHWC: np.ndarray
    label_n: np.ndarray
    crop: dict[str, Any]
    batch_size: int
    seed: tuple[int, int]

    def batch(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows, from 0 to batch_size, of a step's batch."""
        count, side = len(self.label_n), self.image_nHWC.shape[1]
        image = np.empty((len(rows), *self.image_nHWC.shape[1:]), np.uint8)
        label = np.empty(len(rows), np.int32)
        for i, row in enumerate(rows):
            position = step * self.batch_size + int(row)
            epoch, place = divmod(position, count)
            index = _order(self.seed, epoch, count)[place]
            rng = np.random.default_rng([*self.seed, 1, position])
            picture = self.image_nHWC[index]
            image[i] = geometry.random_resized_crop(picture, rng, side, **self.crop)
            label[i] = self.label_n[index]
        partner = np.random.default_rng([*self.seed, 2, step]).permutation(self.batch_size)
        return {'image': image, 'label': label, 'partner': partner.astype(np.int32)[rows]}


@functools.lru_cache(maxsize=4)
def _order(seed: tuple[int, int], epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([*seed, 0, epoch]).permutation(count)


def _read(subject: Subject, rows: np.ndarray, limit: float, where: str) -> np.ndarray:
    """Pictures of rows of `subject.labelled()`, [n, H, W, 3] uint8."""
    first = len(subject.features('train').label_N)  # of validation
    parts = [('train', rows[rows < first]), ('validation', rows[rows >= first] - first)]
    one = next(subject.images(split, some[:1]) for split, some in parts if len(some))
    if len(rows) * one.nbytes > limit:
        raise UserError(
            f'{where}.memory: got {limit / 2**30:g} GiB, but {len(rows)} pictures need '
            f'{len(rows) * one.nbytes / 2**30:.1f}; fewer labels need less.'
        )
    return np.concatenate([x for split, some in parts for x in _decoded(subject, split, some)])


def _decoded(subject: Subject, split: str, rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), READ):
        yield subject.images(split, rows[start : start + READ])


class _Test:
    """The labelled test images with their labels, in parts, as often as they are asked for."""

    def __init__(self, subject: Subject, limit: float):
        label_N = subject.features('test').label_N
        self._encoder, self._rows = encoder, np.flatnonzero(label_N >= 0)
        self._label_n = label_N[self._rows]
        self._fits = len(self._rows) * subject.images('test', self._rows[:1]).nbytes <= limit
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._kept:
            yield from self._kept
            return
        parts = []
        for i, x in enumerate(_decoded(self._encoder, 'test', self._rows)):
            part = x, self._label_n[i * READ : (i + 1) * READ]
            if self._fits:
                parts.append(part)
            yield part
        self._kept = parts


def _share(mesh: Mesh, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` rows this process adds to a batch of `size`, and which of those count.

    A batch that the devices do not divide is filled up with rows that do not.
    """
    local = -(-size // mesh.size) * mesh.size // jax.process_count()
    place = np.arange(local) + local * jax.process_index()
    return place % count, (place < count).astype(np.float32)


def _train(fit: Fit, tower: evals.Tower | None, some: Subset, rates: np.ndarray) -> Any:
    """(params, stats) after one step for each learning rate."""
    key = jax.random.fold_in(jax.random.key(some.seed[0]), some.seed[1])
    start_key, step_key = jax.random.split(key)
    weights = None if tower is None else (tower.params, tower.stats)
    rows, counts = _share(fit.mesh, some.batch_size, some.batch_size)
    with jax.set_mesh(fit.mesh):
        state = _start(fit, weights, start_key, some.image_nHWC.shape[1:])
        for step, rate in enumerate(rates):
            batch = {**some.batch(step, rows), 'counts': counts}
            batch = parallel.shard_batch(fit.mesh, batch)
            state = _step(fit, state, batch, rate, jax.random.fold_in(step_key, step))
    return state[:2]


def _score(fit: Fit, weights: Any, parts: Any) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) on parts of labelled images."""
    total = np.zeros(3)
    for x, label in parts:
        for start in range(0, len(x), RECORDS):
            some = slice(start, start + RECORDS)
            rows, counts = _share(fit.mesh, len(x[some]), RECORDS)
            batch = {'image': x[some][rows], 'label': label[some][rows], 'counts': counts}
            with jax.set_mesh(fit.mesh):
                measured = _measure(fit, *weights, parallel.shard_batch(fit.mesh, batch))
            total += [float(m) for m in measured]
    return total[0] / total[2], total[1] / total[2]


@functools.partial(jax.jit, static_argnames=('fit', 'shape'))
def _start(fit: Fit, weights: Any, key: jax.Array, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """(params, stats, optimiser's state), of copies; the classifier is 0."""
    image = jnp.zeros((1, *shape))
    if weights is None:
        weights = models.init(fit.module, key, image)
    encoder, stats = jax.tree.map(jnp.copy, weights)
    features = jax.eval_shape(lambda: _features(fit, encoder, stats, image, False)[0])
    shapes = {'kernel': (features.shape[1], fit.classes), 'bias': (fit.classes,)}
    head = {name: jnp.zeros(s) for name, s in shapes.items()}
    params = {'encoder': encoder, 'head': head}
    state = params, stats, fit.optimiser().init(params)
    return jax.lax.with_sharding_constraint(state, parallel.replicated(fit.mesh))


def _features(
    fit: Fit, params: Any, stats: Any, x: jax.Array, train: bool, key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    (x_BD, _), stats = models.apply(fit.module, params, stats, x, train=train, key=key)
    return x_BD, stats


def _logits(
    fit: Fit, params: Any, stats: Any, x: jax.Array, train: bool, key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    x_BD, stats = _features(fit, params['encoder'], stats, x, train, key)
    return x_BD @ params['head']['kernel'] + params['head']['bias'][None, :], stats


@functools.partial(jax.jit, static_argnames='fit', donate_argnames='state')
def _step(
    fit: Fit, state: tuple, batch: dict[str, jax.Array], rate: jax.Array, key: jax.Array
) -> tuple[Any, Any, Any]:
    params, stats, opt = state
    x = augment.normalize(batch['image'], fit.mean, fit.std)
    target_BC = jax.nn.one_hot(batch['label'], fit.classes)
    if fit.mixup:
        share = jax.random.beta(jax.random.fold_in(key, 0), fit.mixup, fit.mixup)
        x, target_BC = (share * y + (1 - share) * y[batch['partner']] for y in (x, target_BC))

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits_BC, new = _logits(fit, params, stats, x, True, jax.random.fold_in(key, 1))
        loss_B = -jnp.sum(target_BC * jax.nn.log_softmax(logits_BC), axis=1)
        return jnp.sum(loss_B * batch['counts']) / jnp.sum(batch['counts']), new

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, opt = fit.optimiser().update(grads, opt, params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params, stats, opt


@functools.partial(jax.jit, static_argnames='fit')
def _measure(
    fit: Fit, params: Any, stats: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows that are right, their summed cross-entropy, how many count)."""
    x = augment.normalize(batch['image'], fit.mean, fit.std)
    logits_BC, _ = _logits(fit, params, stats, x, False)
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch['label'])
    right_B = logits_BC.argmax(1) == batch['label']
    counts_B = batch['counts']
    return jnp.sum(right_B * counts_B), jnp.sum(loss_B * counts_B), jnp.sum(counts_B)
