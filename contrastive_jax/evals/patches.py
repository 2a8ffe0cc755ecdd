"""Nearest patches: places of test images that an encoder takes to be alike.

n: images, h w: a map's rows and columns, P: places of all images, D: features, k: neighbours.
"""

from collections.abc import Iterator

import numpy as np

from contrastive_jax import evaluation, figures
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.figures import COLOURS

SIDE = 112  # pixels that small images are enlarged to, about, so that a frame fits a patch


def make(count: int = 8, k: int = 8, records: int = 256, seed: int = 0) -> Evaluate:
    """Draws a place of each of some images and, in the other images, the k places nearest to it.

    Nearest by the cosine of what the encoder gives of a place, 'patches' or 'map', less its mean
    over all places; at most one place of an image.

    Args:
        count: queries, from 1: images evenly spread over the split, a place of each at random.
        k: neighbours, from 1.
        records: test images that are searched, from 2.
        seed: of the places.

    Returns:
        `evaluate(subject)`, which yields the picture 'nearest'. Nothing of raw pixels.

    Raises:
        UserError: a value outside its range.

    Doersch et al. 2015 (arXiv:1505.05192), figure 4.
    """
    where = 'config.evals.patches'
    check_range(where, {'count': count, 'k': k}, least=1, whole=True)
    check_range(where, {'records': records}, least=2, whole=True)
    say = evaluation.missed('Nearest patches')

    def evaluate(subject: Subject) -> Iterator[tuple[str, bytes]]:
        found = subject.first_of(records, ('patches', 'map'), say)
        if found is None:
            return
        images, x = found
        h, w = x.shape[1:3] if x.ndim == 4 else evaluation.grid(images, x.shape[1])
        x_nPD = x.reshape(len(images), h * w, -1)
        some = evaluation.spread(len(images), count)
        places = np.random.default_rng(seed).integers(h * w, size=len(some))
        rows = []
        for image, place in zip(some.tolist(), places.tolist(), strict=True):
            score_nP = cosines(x_nPD, image, place)
            best_n, at_n = score_nP.max(1), score_nP.argmax(1)
            near = np.argsort(-best_n, kind='stable')[: min(k, len(images) - 1)].tolist()
            tiles = [figures.Tile(framed(images[image], place, h, w), frame=COLOURS[0])]
            for i in near:
                tiles.append(figures.Tile(framed(images[i], at_n[i], h, w), f'{best_n[i]:.3f}'))
            rows.append(tiles)
        yield 'nearest', figures.tile_rows(rows, ['place', *map(str, range(1, len(rows[0])))])

    return evaluate


def cosines(x_nPD: np.ndarray, image: int, place: int) -> np.ndarray:
    """[n, P] of every place with one of them; −∞ of all places of its own image."""
    x_nPD = x_nPD - x_nPD.mean((0, 1))
    length_nP = np.sqrt((x_nPD**2).sum(2))
    score_nP = x_nPD @ x_nPD[image, place]
    score_nP /= np.maximum(length_nP * length_nP[image, place], 1e-12)
    score_nP[image] = -np.inf
    return score_nP


def framed(image_HWC: np.ndarray, place: int, h: int, w: int) -> np.ndarray:
    """The image, a small one enlarged by whole pixels, with a frame about a place of its map."""
    scale = max(1, SIDE // max(image_HWC.shape[:2]))
    large = image_HWC.repeat(scale, 0).repeat(scale, 1)
    height, width = large.shape[:2]
    row, column = divmod(int(place), w)
    top, bottom = row * height // h, -(-(row + 1) * height // h)
    left, right = column * width // w, -(-(column + 1) * width // w)
    colour = np.array([int(COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    thick = max(1, scale // 2)
    inside = large[top + thick : bottom - thick, left + thick : right - thick].copy()
    large[top:bottom, left:right] = colour
    large[top + thick : bottom - thick, left + thick : right - thick] = inside
    return large
