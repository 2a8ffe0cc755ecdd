"""Linear classification of frozen features: multinomial logistic regression with an L2 penalty.

The problem is convex, so the result depends on features and labels alone and not on an optimiser's
schedule: it is solved to its minimum (`contrastive_jax.evaluation.logistic`).

N: rows, D: features + 1 (the last is constant: its weight is the bias, and is not penalised),
C: classes, S: sets of rows, P: problems on one set, n: labelled rows of a few-labels set.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

from contrastive_jax import evaluation, figures, parallel
from contrastive_jax.config import UserError, check_range, each
from contrastive_jax.evaluation import Evaluate, few_labels, logistic, percent, pooled
from contrastive_jax.evaluation.subject import Subject, gather, put

STRENGTHS = (1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2)
FOLDS = 5
SUMMED = 1024  # rows that are float64 at a time
TOGETHER = 2**26  # logits of few-labels problems that are solved at a time


def make(
    strengths: Sequence[float] = STRENGTHS,
    outputs: Sequence[str] = ('features',),
    dimensions: int = pooled.DIMENSIONS,
    per_class: Sequence[int] = (10,),
    fractions: Sequence[float] = (),
    draws: int = 5,
    validation_fraction: float = 0.1,
    tolerance: float = 1e-9,
    max_iterations: int = 5000,
    seed: int = 0,
    label: str = 'label',
) -> Evaluate:
    """Logistic regression on features, its strength of regularisation chosen without test labels.

    Minimises Σ_i −log softmax(W·x_i + b)[label_i] + strength/2 · ‖W‖², scikit-learn's
    LogisticRegression with C = 1 / strength. Features are standardised by the mean and standard
    deviation of the labelled training images, of which this uses no label: one grid of strengths
    then suits features of any scale, and no feature is penalised more for being small.

    With all labels the strength is the one with the lowest cross-entropy on 'validation', or where
    there is none on a stratified `validation_fraction` of train; the final classifier is fitted to
    all of these rows. With n labels per class, only the drawn images' labels are used: the strength
    is chosen by stratified 5-fold cross-validation among them (fewer folds where n is less; for
    n = 1, where nothing can be left out, the middle of `strengths`). A few-labels set that is too
    large to be solved so, on one device (more than 1 % of ImageNet), is treated like all labels.
    The test split is used once, by the final classifiers.

    CLIP: the highest validation accuracy; here: the lowest cross-entropy, because of 100 images
    accuracy tells strengths apart too coarsely.

    Args:
        strengths: candidates, each above 0.
        outputs: what of the encoder is classified: 'features', or any that its model names: 'map',
            'stage1', 'cls', 'patches', 'block3', 'last4', ..., or patterns of names, which may
            match none: 'block*'. Maps and patches are pooled, see `Subject.features`; each needs
            memory for these numbers three times.
        dimensions: that a map is pooled to at most, from 1, so that layers are compared at about as
            many each. Fewer than the papers' 9,000 take less time.
        per_class: numbers of labels per class to evaluate beside all labels.
        fractions: shares of the labels to evaluate, too, in (0, 1], the same share of every class.
        draws: random subsets each of those is averaged over.
        validation_fraction: in (0, 1).
        tolerance: a problem is solved by the step that promises to lower its objective by less than
            this share (`logistic.solve`). Far above 1e-9 the order of sums, and so the number of
            devices, may tell on which side of a boundary one of hundreds of images lies.
        max_iterations: products with the features of one problem, at least 1.
        seed: of subsets and validation rows.
        label: the one of the data's labels that is predicted.

    Returns:
        `evaluate(subject)`, which yields 'top1', and the mean and the standard deviation over draws
        'top1_<n>_per_class' and 'top1_<n>_per_class_std' for each n of per_class,
        'top1_<p>_percent' and 'top1_<p>_percent_std' for each of fractions, p being 100 times it;
        of another output than the features the same as '<output>_top1', ..., and the picture
        'depth' of all outputs in the order of `outputs`, the features last. Raw pixels have none.

    Raises:
        UserError: a value outside its range; (when evaluating) an output that there is not.

    The protocol of Radford et al. 2021 (CLIP), appendix A.3, without its finer search.
    """
    where = 'config.evals.linear'
    if not strengths:
        raise UserError(f'{where}.strengths: got none; expected numbers above 0.')
    check_range(where, each('strengths', strengths), above=0)
    check_range(where, {'validation_fraction': validation_fraction}, above=0, below=1)
    sizes = {'max_iterations': max_iterations, 'dimensions': dimensions}
    check_range(where, sizes, least=1, whole=True)
    if not outputs:
        raise UserError(f'{where}.outputs: got none; expected names of outputs of the encoder.')
    few_labels.check(where, per_class, draws, fractions)
    # Strongly regularised problems are solved in a few steps, and each is the next one's start.
    path = sorted(strengths, reverse=True)
    limits = Limits(tolerance, np.int32(max_iterations))
    few = few_labels.named(per_class, fractions)
    say = evaluation.missed('the linear classifier')

    def probe(subject: Subject, output: str, prefix: str) -> Iterator[tuple[str, float]]:
        most = pooled.DIMENSIONS if output == 'features' else dimensions
        train = subject.labelled(output, label, most)
        test = subject.features('test', output, label, most)
        classes = max(len(subject.classes[label]), int(train.label_N.max()) + 1)
        first = len(subject.features('train', output, label, most).label_N)  # of validation
        held_N = (np.arange(len(train.label_N)) >= first) & (train.label_N >= 0)
        if not held_N.any():
            held_N = few_labels.held_out(train.label_N, validation_fraction, seed)
        scale = _scale(train.x_ND, train.label_N)
        with jax.set_mesh(subject.mesh):
            x_ND = _standardise(train.x_ND, train.label_N, *scale)
            weights = [_fit_all(x_ND, train.label_N, held_N, path, classes, limits)]
        for labels in few.values():
            sets = few_labels.draws(train.label_N, labels, draws, seed)
            # Logits of all folds of one set, and half of the numbers in all sets.
            size = len(sets[0]) * max(classes * (FOLDS + 1), draws * x_ND.shape[1] // 2)
            if size <= TOGETHER:
                rows = np.stack(sets)
                x = scale(gather(subject.mesh, train.x_ND, rows))
                weights += _fit_few(x, train.label_N[rows], path, classes, limits)
                continue
            for rows in sets:
                x = scale(gather(subject.mesh, train.x_ND, rows)).astype(np.float32)
                some = put(subject.mesh, x, train.label_N[rows])
                held_n = few_labels.held_out(some.label_N, validation_fraction, seed)
                with jax.set_mesh(subject.mesh):
                    weights.append(_fit_all(*some, held_n, path, classes, limits))
        with jax.set_mesh(subject.mesh):
            x_ND = _standardise(test.x_ND, test.label_N, *scale)
            # One call for all: one compilation.
            hits_S = parallel.to_host(_hits(x_ND, test.label_N, np.stack(weights)))
        top1 = hits_S / (test.label_N >= 0).sum()
        title = evaluation.titled('linear', label)
        title = f'{title}, {output}' if prefix else title
        yield f'{prefix}top1', percent(top1[0], f'{title}, all labels' if few else title)
        for name, scores in zip(few, top1[1:].reshape(-1, draws), strict=True):
            row = f'{title}, {few_labels.titled(name)}'
            yield from few_labels.over_draws(f'{prefix}top1_{name}', scores, row)

    def evaluate(subject: Subject) -> Iterator[tuple[str, float | bytes]]:
        if reason := subject.missing(label):
            say(reason)
            return
        found: dict[str, float] = {}
        if 'features' in outputs:
            for key, value in probe(subject, 'features', ''):
                found.setdefault('features', value)  # the first one is of all labels
                yield key, value
        others = [output for output in outputs if output != 'features']
        if subject.weights is None or not others:
            return
        for output in subject.named(others, f'{where}.outputs'):
            for key, value in probe(subject, output, f'{output}_'):
                found.setdefault(output, value)
                yield key, value
            subject.forget(output)  # maps are large
        if len(found) > 1:
            depth = sorted(found, key='features'.__eq__)  # last, whatever comes before
            shares = {'': [100 * found[output] for output in depth]}
            yield 'depth', figures.depth(shares, depth, evaluation.titled('linear', label))

    return evaluate


def folds(label_n: np.ndarray, count: int) -> np.ndarray:
    """bool [count, n]: which rows each fold leaves out; every class is spread over the folds."""
    fold_n = np.zeros(len(label_n), int)
    for c in np.unique(label_n):
        rows = np.flatnonzero(label_n == c)
        # Classes start at different folds, so that folds are equal even if classes are small.
        fold_n[rows] = (np.arange(len(rows)) + c) % count
    return fold_n[None, :] == np.arange(count)[:, None]


class Limits(NamedTuple):
    """When a problem counts as solved, see logistic.solve."""

    tolerance: float
    max_iterations: np.int32


class Scale(NamedTuple):
    """Standardisation: (x − mean) · inverse, per feature."""

    mean: np.ndarray
    inverse: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = (x.astype(np.float64) - self.mean) * self.inverse
        return np.concatenate([x, np.ones((*x.shape[:-1], 1))], -1)


def _fit_all(
    x_ND: jax.Array,
    label_N: np.ndarray,
    held_N: np.ndarray,
    path: Sequence[float],
    classes: int,
    limits: Limits,
) -> np.ndarray:
    """Chooses the strength on the rows held out, then fits all labelled rows: W_DC."""
    labelled_N = label_N >= 0
    x_1ND = x_ND[None]

    def solve(fit_N: np.ndarray, held_N: np.ndarray, strength: float, W: np.ndarray):
        solution = logistic.solve(
            x_1ND,
            label_N[None],
            fit_N[None, None],
            held_N[None, None],
            np.full((1, 1), strength, np.float32),
            W,  # from the host: wherever it lay, this is the same compiled program
            np.full((1, 1), limits.tolerance, np.float32),
            limits.max_iterations,
        )
        return logistic.to_host(solution)

    W = np.zeros((1, 1, x_ND.shape[1], classes), np.float32)
    best, solutions = len(path) // 2, []
    if held_N.any():
        for strength in path:
            start = solutions[-1].W_SPDC if solutions else W
            solutions.append(solve(labelled_N & ~held_N, held_N, strength, start))
            losses = [float(s.loss_SP[0, 0]) for s in solutions[-3:]]
            if len(losses) == 3 and losses[0] < losses[1] < losses[2]:
                break  # overfitting more and more; the weakest strengths take longest to solve
        best = int(_choose(solutions)[0])
        W = solutions[best].W_SPDC
    solution = solve(labelled_N, np.zeros_like(held_N), path[best], W)
    _report([*solutions, solution], path[best], limits)
    return solution.W_SPDC[0, 0]


def _fit_few(
    x_SnD: np.ndarray,
    label_Sn: np.ndarray,
    path: Sequence[float],
    classes: int,
    limits: Limits,
) -> list[np.ndarray]:
    """Cross-validates and fits S small sets of rows: S times W_DC.

    All folds and the fit to all rows are problems solved side by side. This is little work, which
    every process does for itself on one device.
    """
    S, n, D = x_SnD.shape
    basis = None
    if n < D - 1:
        # The optimum is a combination of the rows, so n coordinates hold all of the problem.
        u, s, basis = np.linalg.svd(x_SnD[..., :-1], full_matrices=False)
        x_SnD = np.concatenate([u * s[:, None, :], x_SnD[..., -1:]], -1)
    # Zeros in front: encoders of different width share one compiled program.
    width = x_SnD.shape[-1]
    padding = -(width - 1) % 128
    x_SnD = np.pad(x_SnD, ((0, 0), (0, 0), (padding, 0))).astype(np.float32)
    count = min(FOLDS, int(np.bincount(label_Sn[0]).max()))
    held_SPn = np.zeros((S, count + 1 if count > 1 else 1, n), bool)
    if count > 1:
        held_SPn[:, :-1] = [folds(label_n, count) for label_n in label_Sn]
    mesh = parallel.make_mesh(jax.local_devices()[:1])
    # Large problems (many classes) one set after the other.
    size = S if S * held_SPn.shape[1] * n * classes <= TOGETHER else 1
    weights = []
    for some in (slice(i, i + size) for i in range(0, S, size)):
        x, label, held = x_SnD[some], label_Sn[some], held_SPn[some]
        W = np.zeros((size, held.shape[1], x.shape[-1], classes), np.float32)
        share = np.full(held.shape[:2], limits.tolerance, np.float32)
        solutions = []
        with jax.set_mesh(mesh):
            for strength in path:
                strength_SP = np.full_like(share, strength)
                start = solutions[-1].W_SPDC if solutions else W
                solution = logistic.solve(
                    x, label, ~held, held, strength_SP, start, share, limits.max_iterations
                )
                solutions.append(logistic.to_host(solution))
            best = _choose(solutions) if count > 1 else np.full(size, len(path) // 2)
            # Once more for the fit to all rows alone, at the strength chosen for each set.
            share[:, :-1] = np.inf
            strength_SP = np.broadcast_to(np.asarray(path, np.float32)[best][:, None], share.shape)
            start = np.stack([solutions[b].W_SPDC[i] for i, b in enumerate(best)])
            solution = logistic.solve(
                x, label, ~held, held, strength_SP, start, share, limits.max_iterations
            )
        solution = logistic.to_host(solution)
        _report([*solutions, solution], strength_SP[:, -1], limits)
        weights += list(solution.W_SPDC[:, -1, padding:])
    if basis is not None:
        weights = [
            np.concatenate([v.T @ W_DC[:-1], W_DC[-1:]])
            for v, W_DC in zip(basis, weights, strict=True)
        ]
    return weights


def _choose(solutions: Sequence[logistic.Solution]) -> np.ndarray:
    """For each set the index of the strength that does best on what its problems held out."""
    return np.stack([s.loss_SP.sum(1) for s in solutions]).argmin(0)


def _report(solutions: Sequence[logistic.Solution], strength: object, limits: Limits) -> None:
    logging.debug('linear classifier: strength %s', strength)
    if max(solution.iterations for solution in solutions) >= limits.max_iterations:
        logging.warning(
            'the linear classifier stopped after max_iterations=%d before it was solved to '
            'tolerance=%g: its accuracy may be a little low',
            limits.max_iterations,
            limits.tolerance,
        )


def _scale(x_ND: jax.Array, label_N: np.ndarray) -> Scale:
    """That of the labelled rows, which are summed in float64: of any number of devices the same."""
    shards = [s for s in x_ND.addressable_shards if s.replica_id == 0]
    parts = [(np.asarray(s.data), label_N[s.index[0]] >= 0) for s in shards]

    def mean(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        total_D = np.zeros(x_ND.shape[1])
        for x, labelled in parts:
            for some in (slice(i, i + SUMMED) for i in range(0, len(x), SUMMED)):
                total_D += of(x[some][labelled[some]].astype(np.float64)).sum(0)
        return parallel.sum_over_processes(total_D) / (label_N >= 0).sum()

    mean_D = mean(lambda x: x)
    std_D = np.sqrt(mean(lambda x: (x - mean_D) ** 2))
    # A constant feature differs from its mean by rounding alone: 0, not noise scaled up to 1.
    inverse_D = np.divide(1, std_D, out=np.zeros_like(std_D), where=std_D > 1e-5 * np.abs(mean_D))
    return Scale(mean_D.astype(np.float32), inverse_D.astype(np.float32))


@jax.jit
def _standardise(
    x_ND: jax.Array, label_N: jax.Array, mean_D: jax.Array, inverse_D: jax.Array
) -> jax.Array:
    """The labelled rows standardised, with a constant column; 0 in the others but for that."""
    x_ND = jnp.where((label_N >= 0)[:, None], x_ND - mean_D[None, :], 0.0) * inverse_D[None, :]
    return jnp.concatenate([x_ND, jnp.ones((x_ND.shape[0], 1))], 1)


@jax.jit
def _hits(x_ND: jax.Array, label_N: jax.Array, W_SDC: jax.Array) -> jax.Array:
    """int [S]: the labelled rows that each classifier gets right."""

    def hits(W_DC: jax.Array) -> jax.Array:
        logits_NC = jnp.matmul(x_ND, W_DC, precision=lax.Precision.HIGHEST)
        return jnp.sum((logits_NC.argmax(1) == label_N) & (label_N >= 0))

    return lax.map(hits, W_SDC)
