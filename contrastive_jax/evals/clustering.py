"""Whether clusters of features are classes: unsupervised classification.

N: images, k: clusters, D: features.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import evaluation, parallel
from contrastive_jax.config import UserError, check_range
from contrastive_jax.evaluation import Evaluate, percent
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.networks.kmeans import kmeans


def make(
    clusters: int = 0, restarts: int = 10, iterations: int = 50, seed: int = 0, label: str = 'label'
) -> Evaluate:
    """k-means of the labelled test images' features, by cosine, compared with their classes.

    Of several restarts the one whose rows are closest to their centroids counts: no label chooses.

    Args:
        clusters: k, from 1; 0: as many as there are classes among these images. Where there are
            more of them than classes, those that stand for none are all wrong.
        restarts: at least 1.
        iterations: of each restart, at least 1.
        seed: of the first centroids.
        label: the one of the data's labels that clusters are compared with.

    Returns:
        `evaluate(subject)`, which yields 'accuracy', the share of images whose cluster stands for
        their class, in the one-to-one matching that makes it highest (Kuhn 1955); and 'nmi', the
        mutual information of clusters and classes over the mean of their entropies, in [0, 1].

    Raises:
        UserError: a value outside its range, or more clusters than images.

    The measures of Xie et al. 2016 (arXiv:1511.06335), section 4.2, and Caron et al. 2018
    (arXiv:1807.05520), eq. 3.
    """
    where = 'config.evals.clustering'
    check_range(where, {'clusters': clusters}, least=0, whole=True)
    check_range(where, {'restarts': restarts, 'iterations': iterations}, least=1, whole=True)
    say = evaluation.missed('clustering')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        from sklearn.metrics import normalized_mutual_info_score

        if reason := subject.missing(label):
            say(reason)
            return
        x_ND, label_N = subject.features('test', label=label)
        counts_N = label_N >= 0
        k = clusters or len(np.unique(label_N[counts_N]))
        if k > counts_N.sum():
            raise UserError(f'{where}.clusters: got {k}, but {counts_N.sum()} labelled images.')
        cluster_N = _cluster(subject, x_ND, counts_N, k)[counts_N]
        called = evaluation.titled('clustering', label)
        yield 'accuracy', percent(matched(label_N[counts_N], cluster_N), f'{called}, accuracy')
        nmi = normalized_mutual_info_score(label_N[counts_N], cluster_N)
        yield 'nmi', percent(nmi, f'{called}, NMI')

    def _cluster(subject: Subject, x_ND: jax.Array, counts_N: np.ndarray, k: int) -> np.ndarray:
        best, found = np.inf, np.zeros(0, int)
        for restart in range(restarts):
            key = jax.random.fold_in(jax.random.key(seed), restart)
            with jax.set_mesh(subject.mesh):
                assignment_N, spread = _kmeans(x_ND, counts_N, key, k=k, iterations=iterations)
            if float(spread) < best:
                best, found = float(spread), parallel.to_host(assignment_N)
        return found

    return evaluate


def matched(label_n: np.ndarray, cluster_n: np.ndarray) -> float:
    """The share of items whose cluster stands for their label in the best one-to-one matching."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((cluster_n.max() + 1, label_n.max() + 1), int)
    np.add.at(counts, (cluster_n, label_n), 1)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(label_n))


@functools.partial(jax.jit, static_argnames=('k', 'iterations'))
def _kmeans(
    x_ND: jax.Array, counts_N: jax.Array, key: jax.Array, *, k: int, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """(cluster of every row, sum of squared distances)."""
    _, assignment_N, distance_N = kmeans(
        x_ND, counts_N, k, key=key, iterations=iterations, spherical=True
    )
    return assignment_N, jnp.sum(distance_N**2)
