"""Principal components of patches' features, drawn as colours.

n: images, h × w: patches of an image, P: patches of all of them, D: features.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from contrastive_jax import evaluation, figures
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject

BACKGROUND = 24  # grey value


def make(count: int = 16, foreground: bool = True) -> Evaluate:
    """Draws each image beside its patches' first three principal components as red, green, blue.

    The components are those of all the images' patches together, so that a colour means the same
    in all of them.

    Args:
        count: images, from 1.
        foreground: whether to find it first, by the sign of the first component, and then the
            components of its patches alone; the rest is dark. Paper: nothing is said of which sign
            it is; here: the one that the patches at the images' borders have less of. Not of
            fewer than 3 × 3 patches, which are all at the border.

    Returns:
        `evaluate(subject)`, which yields the picture 'patches'. Nothing of raw pixels.

    Raises:
        UserError: count below 1.

    DINOv2 (Oquab et al. 2023, arXiv:2304.07193), figure 1 and section 7.6.
    """
    check_range('config.evals.pca', {'count': count}, least=1, whole=True)
    say = evaluation.missed('PCA of patches')

    def evaluate(subject: Subject) -> Iterator[tuple[str, bytes]]:
        found = subject.first_of(count, ('patches', 'map'), say)
        if found is None:
            return
        images, x_nhwD = found
        if x_nhwD.ndim == 3:
            x_nhwD = x_nhwD.reshape(len(images), *evaluation.grid(images, x_nhwD.shape[1]), -1)
        size = images.shape[2], images.shape[1]
        drawn = [
            np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))
            for picture in colours(x_nhwD, foreground)
        ]
        yield 'patches', figures.views_grid(np.stack([images, drawn], axis=1), count=count)

    return evaluate


def colours(x_nhwD: np.ndarray, foreground: bool) -> np.ndarray:
    """uint8 [n, h, w, 3]: the components' ranges over the (foreground's) patches, 1 to 99 %."""
    shape, D = x_nhwD.shape[:3], x_nhwD.shape[3]
    x_PD = x_nhwD.reshape(-1, D).astype(np.float64)
    kept_P = np.ones(len(x_PD), bool)
    # A map of two rows is all border.
    if foreground and min(shape[1:]) > 2:
        first_P = components(x_PD, 1)[:, 0]
        border = np.zeros(shape, bool)
        border[:, [0, -1]] = border[:, :, [0, -1]] = True
        if first_P[border.ravel()].mean() > first_P.mean():
            first_P = -first_P
        # What rounding leaves of equal patches has no sign.
        if (first_P > 0).sum() > 3:
            kept_P = first_P > 0
    y_p3 = components(x_PD[kept_P], 3)
    low, high = np.percentile(y_p3, (1, 99), axis=0)
    wide = high - low
    # A component that hardly varies beside the first is noise: mid-grey, not stretched.
    y_p3 = np.where(wide > 1e-6 * wide[0], (y_p3 - low) / np.where(wide > 0, wide, 1), 0.5)
    picture = np.full((len(x_PD), 3), BACKGROUND, np.uint8)
    picture[kept_P] = (y_p3.clip(0, 1) * 255).round()
    return picture.reshape(*shape, 3)


def components(x_PD: np.ndarray, count: int) -> np.ndarray:
    """Projections of the rows on their first principal components, [P, count], zeros for missing.

    A component's sign is such that its largest loading is positive.
    """
    x_PD = x_PD - x_PD.mean(axis=0)
    _, axes_DD = np.linalg.eigh(x_PD.T @ x_PD)
    axes_Dc = axes_DD[:, ::-1][:, :count]
    largest = np.take_along_axis(axes_Dc, np.abs(axes_Dc).argmax(0)[None], 0)
    y_Pc = x_PD @ (axes_Dc * np.where(largest < 0, -1.0, 1.0))
    return np.pad(y_Pc, ((0, 0), (0, count - y_Pc.shape[1])))
