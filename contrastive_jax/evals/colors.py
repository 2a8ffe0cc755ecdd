"""Colours that a network gives to grey images, beside the true ones.

n: images, H W: their height and width, P: pixels.
"""

from collections.abc import Iterator

import numpy as np

from contrastive_jax import evaluation, figures
from contrastive_jax.augment import lab
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate, Measure, percent, spread
from contrastive_jax.evaluation.subject import Subject

FAR = 150.0  # distance in ab from which on a colour is wrong
SQUARE = 10.0  # side of the squares of ab that count alike


def make(count: int = 8, records: int = 256) -> Evaluate:
    """Draws test images in grey, as coloured and as they are; measures how near the colours are.

    For methods whose `encode` gives 'ab' [B, H, W, 2]. A pixel's error is its distance in ab. The
    area under the curve of the share of pixels whose error is below a threshold, from 0 to 150, is
    the paper's AuC (Zhang et al. 2016, section 3.1); here without steps. Most pixels have little
    colour, and grey is near to them: so there is also one in which every colour that occurs, every
    square of 10 × 10 in ab, counts alike. Paper: weights are 1 / the training data's prior.

    Two answers to beat need no network: grey, and sepia, the mean colour of training images.

    Args:
        count: images that are drawn, from 1.
        records: test images that are measured, and training images that sepia is of, from 1.

    Returns:
        `evaluate(subject)`, which yields the picture 'images' and shares in [0, 1]: 'auc' and
        'balanced_auc', beside them those of 'grey_' and 'sepia_'; and 'chroma', the mean distance
        of the colours from grey over that of the true ones. Nothing where there is no 'ab'.

    Raises:
        UserError: a number below 1.
    """
    sizes = {'count': count, 'records': records}
    check_range('config.evals.colors', sizes, least=1, whole=True)
    say = evaluation.missed('Colours')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float | bytes]]:
        found = subject.first_of(max(count, records), ('ab',), say)
        if found is None:
            return
        images, ab = found
        true = lab.rgb_to_lab(images / 255.0, np)
        answers = {'': ab, 'grey': np.zeros(2)}
        if 'train' in subject.splits:
            rows = spread(len(subject.splits['train']), records)
            some, used = subject.rows('train', rows)
            some = lab.rgb_to_lab(some['image'][used] / 255.0, np)
            answers['sepia'] = some[..., 1:].reshape(-1, 2).mean(0)
        for name, answer in answers.items():
            raw, balanced = auc(np.broadcast_to(answer, ab.shape), true[..., 1:])
            before, called = (f'{name}_', f'{name}, ') if name else ('', '')
            yield f'{before}auc', percent(raw, f'colours, {called}AuC')
            yield f'{before}balanced_auc', percent(balanced, f'colours, {called}balanced AuC')
        chroma = [np.linalg.norm(x, axis=-1).mean() for x in (ab, true[..., 1:])]
        if chroma[1] > 0:
            yield 'chroma', Measure(chroma[0] / chroma[1], 'colours, chroma over the true one')
        rows = []
        for i in spread(len(images), count):
            light = true[i, ..., :1]
            shown = [lab.lab_to_rgb(np.concatenate([light, x], -1), np) for x in (0 * ab[i], ab[i])]
            drawn = [np.round(255 * x).astype(np.uint8) for x in shown]
            rows.append([figures.Tile(x) for x in (*drawn, images[i])])
        yield 'images', figures.tile_rows(rows, ['grey', 'coloured', 'true'])

    return evaluate


def auc(ab: np.ndarray, true_ab: np.ndarray) -> tuple[float, float]:
    """AuC of all pixels, and of all colours that occur, in [0, 1].

    Args:
        ab, true_ab: [..., 2].
    """
    # The area under one pixel's curve, which steps from 0 to 1 at its error.
    error = np.linalg.norm(np.float64(ab) - true_ab, axis=-1).ravel()
    area_P = np.maximum(FAR - error, 0) / FAR
    square_P2 = np.round(true_ab.reshape(-1, 2) / SQUARE)
    _, square_P = np.unique(square_P2, axis=0, return_inverse=True)
    square_P = square_P.ravel()
    means = np.bincount(square_P, area_P) / np.bincount(square_P)
    return float(area_P.mean()), float(means.mean())
