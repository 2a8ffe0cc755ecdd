"""Filters of a network's first layer: what it looks for in pixels.

F: filters, p q: height and width of each, C: channels.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np

from contrastive_jax import evaluation, figures
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject


def make(count: int = 64) -> Evaluate:
    """Draws the kernels of the first convolution, or of the layer that embeds patches.

    Each is stretched to its own range, with 0 in mid-grey. Those of the largest norm come first.

    Args:
        count: filters that are drawn, from 1.

    Returns:
        `evaluate(subject)`, which yields the picture 'first_layer'. Nothing where no layer sees
        pixels of one or three channels: of the baseline, of sound.
    """
    check_range('config.evals.filters', {'count': count}, least=1, whole=True)
    say = evaluation.missed('the first layer')

    def evaluate(subject: Subject) -> Iterator[tuple[str, bytes]]:
        if subject.weights is None:
            return
        kernel = first(subject.weights.params)
        if kernel is None:
            say('it has no kernels of images')
            return
        yield 'first_layer', figures.views_grid(pictures(kernel, count)[:, None], count=count)

    return evaluate


def first(params: object) -> np.ndarray | None:
    """The kernel [p, q, C, F] of the layer that sees pixels; None: there is none."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(part, 'key', part)) for part in path]
        if x.ndim == 4 and x.shape[2] in (1, 3) and max(x.shape[:2]) > 1:
            return np.asarray(x)
        if names[-2:] == ['patch_embedding', 'kernel'] and x.ndim == 2:
            for channels in (3, 1):
                side = math.isqrt(x.shape[0] // channels)
                if side**2 * channels == x.shape[0]:
                    return np.asarray(x).reshape(side, side, channels, -1)
    return None


def pictures(kernel_pqCF: np.ndarray, count: int) -> np.ndarray:
    """Float [n, p, q, 3] in [0, 1] of at most `count` filters."""
    filters_FpqC = np.moveaxis(kernel_pqCF, -1, 0).astype(np.float64)
    norm_F = np.sqrt((filters_FpqC**2).sum((1, 2, 3)))
    filters_FpqC = filters_FpqC[np.argsort(-norm_F, kind='stable')[:count]]
    reach = np.abs(filters_FpqC).max((1, 2, 3), keepdims=True)
    drawn = 0.5 + 0.5 * filters_FpqC / np.where(reach > 0, reach, 1)
    return np.repeat(drawn, 3, axis=3) if drawn.shape[3] == 1 else drawn
