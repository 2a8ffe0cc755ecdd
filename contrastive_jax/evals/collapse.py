"""Whether features have collapsed: how evenly they fill the space that they have.

N: images, D: features.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.losses import unit


def make() -> Evaluate:
    """Two indicators, of the test images' features (or of train's, where there is no test split).

    Returns:
        `evaluate(subject)`, which yields 'std', the standard deviation of features of unit length
        times √D, averaged over dimensions: 1 if they are spread evenly, 0 if all are one (SimSiam,
        Chen and He 2021, figure 2); and 'rank', e to the entropy of the features' singular values,
        from 1 to D (RankMe, Garrido et al. 2023, arXiv:2210.02885, eq. 2).
    """

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        split = 'test' if 'test' in subject.splits else 'train'
        with jax.set_mesh(subject.mesh):
            moments = _moments(subject.features(split).x_ND)
        counts, mean_D, square_D, gram_DD = (np.asarray(x, np.float64) for x in moments)
        yield 'std', float(np.sqrt(np.maximum(square_D - mean_D**2, 0)).mean() * len(mean_D) ** 0.5)
        # The squares of the singular values; those that are rounding alone can be negative.
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram_DD / max(counts, 1)), 0))
        share = values / values.sum() if values.any() else np.ones(1)
        yield 'rank', float(np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)))))

    return evaluate


@jax.jit
def _moments(x_ND: jax.Array) -> tuple[jax.Array, ...]:
    """Number of rows that count (others are zeros), moments of unit rows, and X'X."""
    counts = jnp.maximum((x_ND != 0).any(axis=1).sum(), 1)
    z_ND = unit(x_ND)
    mean_D, square_D = z_ND.sum(0) / counts, (z_ND**2).sum(0) / counts
    gram_DD = jnp.matmul(x_ND.T, x_ND, precision=lax.Precision.HIGHEST)
    return counts, mean_D, square_D, gram_DD
