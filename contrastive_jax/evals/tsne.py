"""A map of test images: t-SNE of their features.

N: images, D: features.
"""

from collections.abc import Iterator

import numpy as np

from contrastive_jax import evaluation, figures, parallel
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject

DIMENSIONS = 50  # that are left of the features before (van der Maaten and Hinton, section 4.2: 30)


def make(
    count: int = 2000,
    classes: int = 20,
    perplexity: float = 30.0,
    seed: int = 0,
    label: str = 'label',
) -> Evaluate:
    """Draws the test images as points, near each other where their features are, coloured by class.

    Features are scaled to unit length, as for cosine similarity.

    Args:
        count: images at most, from 2, drawn at random. 2,000 take about 10 s on one core.
        classes: at most so many, from 1, evenly spread over all classes; a map of a thousand would
            have no readable colours. Images without a label are grey, and drawn if none has one.
        perplexity: about how many neighbours count for each image, above 0; at most a third of
            the images.
        seed: of the draw and of t-SNE.
        label: the one of the data's labels that colours the points.

    Returns:
        `evaluate(subject)`, which yields the picture 'map'. Nothing where there are too few images.

    Raises:
        UserError: a value outside its range.

    van der Maaten and Hinton 2008, Visualizing Data using t-SNE.
    """
    where = 'config.evals.tsne'
    check_range(where, {'count': count}, least=2, whole=True)
    check_range(where, {'classes': classes}, least=1, whole=True)
    check_range(where, {'perplexity': perplexity}, above=0)
    say = evaluation.missed('t-SNE')

    def evaluate(subject: Subject) -> Iterator[tuple[str, bytes]]:
        split = 'test' if 'test' in subject.splits else 'train'
        x_ND, label_N = subject.features(split, label=label)
        x_ND = parallel.to_host(x_ND)
        # Padding and bad records are rows of zeros.
        rows = np.flatnonzero((x_ND != 0).any(axis=1) & np.isfinite(x_ND).all(axis=1))
        there = np.unique(label_N[rows][label_N[rows] >= 0])
        title = f'{split} records'
        if len(there):
            chosen = there[evaluation.spread(len(there), classes)]
            rows = rows[np.isin(label_N[rows], chosen)]
            if len(chosen) < len(there):
                title += f' of {len(chosen)} of {len(there):,} classes'
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
        if len(rows) < 4 or not np.ptp(x_ND[rows], axis=0).any():
            say('there are too few records' if len(rows) < 4 else 'all features are the same')
            return
        y_N2 = embed(x_ND[rows], perplexity, seed)
        title = f't-SNE of {len(rows):,} {title}'
        yield 'map', figures.scatter(y_N2, label_N[rows], subject.classes.get(label, []), title)

    return evaluate


def embed(x_ND: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """[N, 2]: t-SNE of the rows at unit length, the same bits at every call."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    z_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    # One thread: of several, sums come out in another order each time, and t-SNE is chaotic.
    with threadpool_limits(1):
        if min(z_ND.shape) > DIMENSIONS:
            z_ND = PCA(DIMENSIONS, svd_solver='covariance_eigh').fit_transform(z_ND)
        perplexity = min(perplexity, (len(z_ND) - 1) / 3)
        return TSNE(perplexity=perplexity, init='pca', random_state=seed).fit_transform(z_ND)
