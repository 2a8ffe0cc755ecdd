"""Pictures of a ViT's attention: that of its last block's heads, over some test images.

n: images, K: heads, N: patches.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from contrastive_jax import evaluation, figures
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject


def make(count: int = 8, mass: float = 1.0) -> Evaluate:
    """Draws, for each image, what CLS attends to in every head, and the mean over the heads.

    Without a CLS token it is the attention that a patch gets on the average of all. Each map is
    scaled to its own largest value.

    Args:
        count: images, from 1.
        mass: share of each head's attention to show, in (0, 1]: the patches with the largest
            weights that have it together. DINO's figures: 0.6.

    Returns:
        `evaluate(subject)`, which yields the picture 'heads'. Nothing where the encoder has no
        attention.

    Raises:
        UserError: a value outside its range.

    DINO (Caron et al. 2021, arXiv:2104.14294), figures 1 and 3.
    """
    check_range('config.evals.attention', {'count': count}, least=1, whole=True)
    check_range('config.evals.attention', {'mass': mass}, above=0, most=1)
    say = evaluation.missed('Attention')

    def evaluate(subject: Subject) -> Iterator[tuple[str, bytes]]:
        found = subject.first_of(count, ('attention',), say)
        if found is None:
            return
        images, weights_nKN = found
        weights_nKN = np.concatenate([weights_nKN, weights_nKN.mean(1, keepdims=True)], 1)
        maps = upsampled(kept(weights_nKN, mass), images)
        rows = [
            [figures.Tile(image), *(figures.Tile(figures.heat(x)) for x in of_image)]
            for image, of_image in zip(images, maps, strict=True)
        ]
        heads = [f'head {k + 1}' for k in range(maps.shape[1] - 1)]
        yield 'heads', figures.tile_rows(rows, ['image', *heads, 'mean'])

    return evaluate


def kept(weights_nKN: np.ndarray, mass: float) -> np.ndarray:
    """The weights, without those outside the fewest patches that have this share of their sum."""
    order = np.argsort(-weights_nKN, axis=2, kind='stable')
    total = np.cumsum(np.take_along_axis(weights_nKN, order, 2), axis=2)
    # A patch is in if those before it have not reached the share.
    before = np.concatenate([np.zeros_like(total[:, :, :1]), total[:, :, :-1]], axis=2)
    inside = np.empty(total.shape, bool)
    np.put_along_axis(inside, order, before < mass * total[:, :, -1:], 2)
    return np.where(inside, weights_nKN, 0)


def upsampled(x_nKN: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Values of patches as those of the images' pixels, [n, K, H, W]."""
    rows, columns = evaluation.grid(images, x_nKN.shape[2])
    x_nKhw = x_nKN.astype(np.float32).reshape(*x_nKN.shape[:2], rows, columns)
    size, nearest = (images.shape[2], images.shape[1]), Image.Resampling.NEAREST
    maps = [Image.fromarray(x_hw).resize(size, nearest) for x_Khw in x_nKhw for x_hw in x_Khw]
    return np.stack(list(map(np.asarray, maps))).reshape(*x_nKN.shape[:2], *images.shape[1:3])
