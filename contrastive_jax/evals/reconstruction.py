"""Images whose hidden parts a network has drawn: masked autoencoders, filled holes.

n: images, H W: their height and width, C: channels.
"""

from collections.abc import Iterator

import numpy as np

from contrastive_jax import evaluation, figures
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import Evaluate, Measure, spread
from contrastive_jax.evaluation.subject import Subject

HIDDEN = 128  # grey value


def make(count: int = 8, records: int = 256) -> Evaluate:
    """Draws test images with parts hidden, as filled and as they are; measures what was filled.

    For methods whose `encode` gives 'filled' [B, H, W, C], in the values that networks see, and
    'hidden' [B, H, W, 1], 1 where they were not shown the image; what they hide of an image must
    not depend on the others. MAE with normalised targets is given the mean and the variance of
    every true patch: its PSNR is that of the patches' texture, and compares with that of other
    masks and networks of its kind, not with methods that must find the colours, too.

    Args:
        count: images that are drawn, from 1.
        records: test images that are measured, from 1.

    Returns:
        `evaluate(subject)`, which yields the picture 'images' and, of all hidden pixels together
        in values from 0 to 1, the peak signal-to-noise ratio: 'psnr', and beside it 'mean_psnr',
        that of the mean of the pixels of the image that are shown. Nothing where there is no
        'filled'.

    Raises:
        UserError: a number below 1.
    """
    sizes = {'count': count, 'records': records}
    check_range('config.evals.reconstruction', sizes, least=1, whole=True)
    say = evaluation.missed('Reconstruction')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float | bytes]]:
        found = subject.first_of(max(count, records), ('filled',), say)
        if found is None:
            return
        true, filled = found
        hidden = subject.of({'image': true}, 'hidden') > 0.5
        filled = in_pixels(subject, true, filled)
        x = true / 255.0
        yield 'psnr', Measure(psnr(x, filled, hidden), 'reconstruction, PSNR', 'dB')
        shown = ~hidden
        mean = (x * shown).sum((1, 2), keepdims=True) / shown.sum((1, 2), keepdims=True)
        flat = np.broadcast_to(mean, x.shape)
        yield 'mean_psnr', Measure(psnr(x, flat, hidden), 'mean of what is seen, PSNR', 'dB')
        masked = np.where(hidden, np.uint8(HIDDEN), true)
        drawn = np.where(hidden, (filled.clip(0, 1) * 255).round().astype(np.uint8), true)
        rows = [
            [figures.Tile(of_image[i]) for of_image in (masked, drawn, true)]
            for i in spread(len(true), count)
        ]
        yield 'images', figures.tile_rows(rows, ['hidden', 'filled', 'true'])

    return evaluate


def in_pixels(subject: Subject, true: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values that a network sees as those of pixels in [0, 1], [n, H, W, C].

    What the inputs do to black and to white tells it: they are affine in every channel.
    """
    ends = np.stack([np.zeros_like(true[0]), np.full_like(true[0], 255)])
    batch = subject.inputs.eval.device(None, {'image': ends})  # pyright: ignore
    black, white = np.asarray(batch['image'], np.float64)
    return (x - black) / (white - black)


def psnr(x: np.ndarray, y: np.ndarray, where: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB, of values in [0, 1], y clipped to it.

    Args:
        x, y: [n, H, W, C].
        where: bool [n, H, W, 1], of the pixels that count.
    """
    error = ((x - y.clip(0, 1)) ** 2 * where).sum() / (where.sum() * x.shape[3])
    return float(-10 * np.log10(max(error, 1e-12)))
