"""Nearest-neighbour classification of frozen features: nothing is trained.

M: queries, N: bank rows, n: rows of a subset, D: features, C: classes, k: neighbours.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from contrastive_jax import evaluation, figures, parallel, similarity
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate, few_labels, percent
from contrastive_jax.evaluation.subject import Subject, gather

TILE = 4096  # 64 MiB of scores: with large k, fewer merges of best ks count for more


def make(
    k: int = 20,
    temperature: float = 0.07,
    per_class: Sequence[int] = (10,),
    fractions: Sequence[float] = (),
    draws: int = 5,
    seed: int = 0,
    confusion: bool = False,
    label: str = 'label',
) -> Evaluate:
    """The weighted kNN classifier of instance discrimination and DINO.

    The k labelled images with the highest cosine similarity vote for their class with weight
    exp(similarity / temperature). They come from train (and 'validation' where there is one), the
    queries from test.

    Args:
        k: neighbours that vote, at least 1; where fewer are labelled, all of them vote.
        temperature: of the votes' weights, above 0. DINO: 0.07 with k 20; CIFAR-10 with a bank of
            50,000 usually 0.1 with k 200.
        per_class: numbers of labels per class to evaluate beside all labels.
        fractions: shares of the labels to evaluate, too, in (0, 1], the same share of every class.
        draws: random subsets each of those is averaged over.
        seed: of the subsets.
        confusion: whether to draw which class is taken for which, with all labels.
        label: the one of the data's labels that is predicted.

    Returns:
        `evaluate(subject)`, which yields 'top1', and the mean and the standard deviation over draws
        'top1_<n>_per_class' and 'top1_<n>_per_class_std' for each n of per_class,
        'top1_<p>_percent' and 'top1_<p>_percent_std' for each of fractions, p being 100 times it;
        and the picture 'confusion'.

    Raises:
        UserError: a value outside its range.

    Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    section 3.4.
    """
    check_range('config.evals.knn', {'k': k}, least=1, whole=True)
    check_range('config.evals.knn', {'temperature': temperature}, above=0)
    few_labels.check('config.evals.knn', per_class, draws, fractions)
    few = few_labels.named(per_class, fractions)
    say = evaluation.missed('kNN')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float | bytes]]:
        if reason := subject.missing(label):
            say(reason)
            return
        bank, test = subject.labelled(label=label), subject.features('test', label=label)
        names = subject.classes[label]
        classes = max(len(names), int(bank.label_N.max()) + 1)
        queries = np.flatnonzero(test.label_N >= 0)
        label_M = test.label_N[queries]

        def vote(x_ND: jax.Array | np.ndarray, label_N: np.ndarray) -> np.ndarray:
            neighbours = min(k, int((label_N >= 0).sum()))
            with jax.set_mesh(subject.mesh):
                found = nearest(test.x_ND, x_ND, label_N >= 0, k=neighbours)
                voted_M = classify(*found, label_N, temperature, classes=classes)
            return parallel.to_host(voted_M)[queries]

        voted_M = vote(bank.x_ND, bank.label_N)
        top1 = float(np.mean(voted_M == label_M))
        called = evaluation.titled('knn', label)
        yield 'top1', percent(top1, f'{called}, all labels' if few else called)
        for name, labels in few.items():
            # One subset after the other on the host: those of a large share are large.
            scores = [
                float(np.mean(vote(subset, bank.label_N[rows]) == label_M))
                for rows in few_labels.draws(bank.label_N, labels, draws, seed)
                for subset in [gather(subject.mesh, bank.x_ND, rows)]
            ]
            title = f'{called}, {few_labels.titled(name)}'
            yield from few_labels.over_draws(f'top1_{name}', scores, title)
        if confusion:
            size = max(classes, int(label_M.max()) + 1)
            counts_CC = np.zeros((size, size), np.int64)
            np.add.at(counts_CC, (label_M, voted_M), 1)
            names = [*names, *map(str, range(len(names), size))]
            title = (
                f'{called}, k = {k}: {100 * top1:.1f} % of {len(label_M):,} test records are right'
            )
            yield 'confusion', figures.confusion(counts_CC, names, title)

    return evaluate


@functools.partial(jax.jit, static_argnames='k')
def nearest(
    query_MD: jax.Array, bank_ND: jax.Array, counts_N: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """(cosines, rows) of each query's k nearest among the bank rows that count, [M, k] each."""

    def cosine(rows: jax.Array, bank: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_nD, counts_n = bank
        scores = jnp.matmul(rows, x_nD.T, precision=lax.Precision.HIGHEST)
        return jnp.where(counts_n[None, :], scores, -jnp.inf)

    return similarity.top_k(cosine, _unit(query_MD), (_unit(bank_ND), counts_N), k, tile=TILE)


@functools.partial(jax.jit, static_argnames='classes')
def classify(
    scores_Mk: jax.Array,
    neighbours_Mk: jax.Array,
    label_N: jax.Array,
    temperature: jax.Array,
    *,
    classes: int,
) -> jax.Array:
    """The class that each query's neighbours vote for."""
    # Relative to the nearest one: the vote is the same, and exp(1 / temperature) cannot overflow.
    weights_Mk = jnp.exp((scores_Mk - scores_Mk[:, :1]) / temperature)
    voted_Mk = label_N[neighbours_Mk]

    def vote(i: jax.Array, votes_MC: jax.Array) -> jax.Array:
        chosen_MC = voted_Mk[:, i][:, None] == jnp.arange(classes)[None, :]
        return votes_MC + jnp.where(chosen_MC, weights_Mk[:, i][:, None], 0.0)

    # A loop, because [M, k, C] would not fit for 50,000 images of 1,000 classes.
    M, k = scores_Mk.shape
    return lax.fori_loop(0, k, vote, jnp.zeros((M, classes))).argmax(1)


def _unit(x_ND: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays."""
    norm_N1 = jnp.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / jnp.where(norm_N1 > 0, norm_N1, 1.0)
