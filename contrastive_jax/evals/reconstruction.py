"""Images whose hidden parts a network has drawn: masked autoencoders, filled holes.

n: images, H W: their height and width, C: channels.
"""

import importlib.util
from collections.abc import Iterator

import numpy as np

from contrastive_jax import evaluation, figures
from contrastive_jax.config import check_range
from contrastive_jax.evaluation import PERCENT, Evaluate, Measure, spread
from contrastive_jax.evaluation.subject import Subject

HIDDEN = 128  # grey value
UNKNOWN = 2**19  # hidden pixels that are inpainted: a linear system of all of an image's
INSTALL = "it needs scikit-image: pip install 'contrastive-jax[inpainting]'"


def make(count: int = 8, records: int = 256, biharmonic: int = 256) -> Evaluate:
    """Draws test images with parts hidden, as filled and as they are; measures what was filled.

    For methods whose `encode` gives 'filled' [B, H, W, C], in the values that networks see, and
    'hidden' [B, H, W, 1], 1 where they were not shown the image; what they hide of an image must
    not depend on the others. MAE with normalised targets is given the mean and the variance of
    every true patch: its PSNR is that of the patches' texture, and compares with that of other
    masks and networks of its kind, not with methods that must find the colours, too.

    Args:
        count: images that are drawn, from 1.
        records: test images that are measured, from 1.
        biharmonic: those of them, at most, that scikit-image inpaints, too, evenly spread; fewer
            where these have more than 524,288 hidden pixels together, as 13 images of 224 pixels
            under MAE's masks do, because it takes a CPU seconds for 100,000 of them. 0, or without
            scikit-image: none.

    Returns:
        `evaluate(subject)`, which yields the picture 'images' and, of all hidden pixels together
        in values from 0 to 1, the peak signal-to-noise ratio 'psnr', the mean absolute error 'l1'
        and the mean squared error 'l2' (Pathak et al. 2016, table 1); and beside them those of the
        mean of the pixels of the image that are shown, 'mean_psnr' and so on, and of biharmonic
        inpainting, 'biharmonic_psnr' and so on. Nothing where there is no 'filled'.

    Raises:
        UserError: a number below 1, or biharmonic below 0.
    """
    where, sizes = 'config.evals.reconstruction', {'count': count, 'records': records}
    check_range(where, sizes, least=1, whole=True)
    check_range(where, {'biharmonic': biharmonic}, least=0, whole=True)
    say, say_smooth = map(evaluation.missed, ('Reconstruction', 'Biharmonic inpainting'))

    def evaluate(subject: Subject) -> Iterator[tuple[str, float | bytes]]:
        found = subject.first_of(max(count, records), ('filled',), say)
        if found is None:
            return
        true, filled = found
        hidden = subject.of({'image': true}, 'hidden') > 0.5
        filled = in_pixels(subject, true, filled)
        x = true / 255.0
        yield from measures('', 'reconstruction', x, filled, hidden)
        shown = ~hidden
        mean = (x * shown).sum((1, 2), keepdims=True) / shown.sum((1, 2), keepdims=True)
        flat = np.broadcast_to(mean, x.shape)
        yield from measures('mean_', 'mean of what is seen', x, flat, hidden)
        some = spread(len(x), affordable(hidden, biharmonic))
        if len(some) and importlib.util.find_spec('skimage') is None:
            say_smooth(INSTALL)
        elif len(some):
            smooth = inpainted(x[some], hidden[some])
            title = 'biharmonic' if len(some) == len(x) else f'biharmonic, of {len(some)} images'
            yield from measures('biharmonic_', title, x[some], smooth, hidden[some])
        masked = np.where(hidden, np.uint8(HIDDEN), true)
        drawn = np.where(hidden, (filled.clip(0, 1) * 255).round().astype(np.uint8), true)
        rows = [
            [figures.Tile(of_image[i]) for of_image in (masked, drawn, true)]
            for i in spread(len(true), count)
        ]
        yield 'images', figures.tile_rows(rows, ['hidden', 'filled', 'true'])

    return evaluate


def measures(
    name: str, title: str, x: np.ndarray, y: np.ndarray, where: np.ndarray
) -> Iterator[tuple[str, Measure]]:
    """Distances of y from x where pixels are hidden, as numbers of an evaluator.

    Args:
        name, title: the numbers' names begin with these.
        x, y: [n, H, W, C], in [0, 1], y clipped to it.
        where: bool [n, H, W, 1].
    """
    yield f'{name}psnr', Measure(psnr(x, y, where), f'{title}, PSNR', 'dB')
    for power in (1, 2):
        value = error(x, y, where, power)
        yield f'{name}l{power}', Measure(value, f'{title}, L{power}', PERCENT)


def in_pixels(subject: Subject, true: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values that a network sees as those of pixels in [0, 1], [n, H, W, C].

    What the inputs do to black and to white tells it: they are affine in every channel.
    """
    ends = np.stack([np.zeros_like(true[0]), np.full_like(true[0], 255)])
    batch = subject.inputs.eval.device(None, {'image': ends})  # pyright: ignore
    black, white = np.asarray(batch['image'], np.float64)
    return (x - black) / (white - black)


def error(x: np.ndarray, y: np.ndarray, where: np.ndarray, power: int) -> float:
    """Mean of |x − y|^power over the pixels that count, y clipped to [0, 1].

    Args:
        x, y: [n, H, W, C].
        where: bool [n, H, W, 1], of the pixels that count.
        power: 1 or 2.
    """
    apart = np.abs(x - y.clip(0, 1)) ** power
    return float((apart * where).sum() / (where.sum() * x.shape[3]))


def psnr(x: np.ndarray, y: np.ndarray, where: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB, of values in [0, 1], y clipped to it; see `error`."""
    return float(-10 * np.log10(max(error(x, y, where, 2), 1e-12)))


def affordable(hidden: np.ndarray, most: int) -> int:
    """Images, at most `most`, that have UNKNOWN hidden pixels together; at least one of them."""
    return min(most, len(hidden), max(1, int(UNKNOWN // hidden.sum((1, 2, 3)).mean())))


def inpainted(x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Images whose hidden pixels are as smooth a surface as their neighbours allow.

    Damelin and Hoang 2018, as scikit-image has it.

    Args:
        x: [n, H, W, C] in [0, 1].
        hidden: bool [n, H, W, 1].
    """
    from skimage.restoration import inpaint_biharmonic

    pairs = zip(x, hidden[..., 0], strict=True)
    return np.stack([inpaint_biharmonic(image, mask, channel_axis=-1) for image, mask in pairs])
