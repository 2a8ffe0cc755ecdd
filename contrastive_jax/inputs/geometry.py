"""Crops, flips and resizes on the host, where the original resolution is. uint8 in, uint8 out.

Dimension key: H, W height and width of an image; S size of the crop.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from contrastive_jax import config

CROP = 'scale', 'ratio', 'interpolation', 'flip', 'pad'
INTERPOLATION = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws the box of a random-resized crop.

    Ten tries: an area uniform in `scale` × H × W, an aspect ratio w/h log-uniform in `ratio`, and
    if the box fits, a uniform place. Otherwise the largest centred box whose ratio is within the
    limits. The distribution of torchvision's RandomResizedCrop.get_params; Szegedy et al., "Going
    deeper with convolutions" (2015), section 6.

    Args:
        rng: draws come from here alone.
        height: H, pixels.
        width: W, pixels.
        scale: smallest and largest share of the area, in (0, 1].
        ratio: smallest and largest w/h, > 0.

    Returns:
        left, top, right, bottom in whole pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        u_area, u_ratio, u_top, u_left = rng.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, min(height, round(width / ratio[0])))
    elif width > ratio[1] * height:
        w = max(1, min(width, round(height * ratio[1])))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: Image.Image | np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = 'bicubic',
    flip: float = 0.5,
    pad: int = 0,
) -> np.ndarray:
    """A random crop resized to S × S with antialiasing, flipped left to right with a probability.

    Or, with `pad`, a window S × S at a random place of the image with black around it, after its
    centre square has been resized to S × S (the usual crop for CIFAR-10, He et al. 2016, section
    4.2): scale and ratio then do not count.

    Args:
        image: [H, W, 3] uint8, or a Pillow image (converted once where several views are drawn).
        rng: draws come from here alone.
        size: S, pixels.
        scale: smallest and largest share of the area, in (0, 1].
        ratio: smallest and largest width / height of the box, > 0.
        interpolation: 'bicubic' (as SimCLR) or 'bilinear'.
        flip: probability of a horizontal flip.
        pad: pixels of black on each side; 0: a resized crop.

    Returns:
        [S, S, 3] uint8.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if pad:
        square = center_crop_resize(np.asarray(picture), size, 1.0, interpolation)
        top, left = rng.integers(0, 2 * pad + 1, 2)
        around = np.pad(square, ((pad, pad), (pad, pad), (0, 0)))
        crop = around[top : top + size, left : left + size]
    else:
        box = crop_box(rng, picture.height, picture.width, scale, ratio)
        # Not resize(box=box): its antialiasing reaches past the crop's edge, torchvision's does
        # not.
        crop = np.asarray(picture.crop(box).resize((size, size), INTERPOLATION[interpolation]))
    return crop[:, ::-1] if rng.random() < flip else crop


def center_crop_resize(
    image: np.ndarray, size: int, crop_fraction: float = 1.0, interpolation: str = 'bicubic'
) -> np.ndarray:
    """The evaluators' crop: the shorter side resized to S / crop_fraction, then the centre S × S.

    Args:
        image: [H, W, 3] uint8.
        size: S, pixels.
        crop_fraction: S over the resized shorter side, in (0, 1]; 224/256 = 0.875 is ImageNet's.
        interpolation: 'bicubic' or 'bilinear'.

    Returns:
        [S, S, 3] uint8.
    """
    height, width = image.shape[:2]
    if height == width == size and crop_fraction == 1:
        return image
    # One resize of the centre square of the source; the same as resize, then crop, without
    # resizing what the crop throws away and without rounding the crop to whole pixels.
    side = min(height, width) * crop_fraction
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resample = INTERPOLATION[interpolation]
    return np.asarray(Image.fromarray(image).resize((size, size), resample, box=box))


def crop_options(crop: Mapping[str, Any], where: str = 'config.inputs.crop') -> dict[str, Any]:
    """The keywords of random_resized_crop that a config sets, checked before any thread starts.

    Args:
        crop: some of scale, ratio, interpolation, flip and pad.
        where: the config key, for errors.

    Raises:
        UserError: unknown key, or a value outside its range.
    """
    options = {key: crop[key] for key in crop}
    for key in options:
        config.choose('key', key, dict.fromkeys(CROP), where)
    config.choose('interpolation', options.get('interpolation', 'bicubic'), INTERPOLATION, where)
    for key, most in (('scale', 1.0), ('ratio', math.inf)):
        if key in options:
            options[key] = span(options[key], most, f'{where}.{key}')
    config.check_range(where, {'flip': options.get('flip', 0.5)}, least=0, most=1)
    config.check_range(where, {'pad': options.get('pad', 0)}, least=0, whole=True)
    return options


def span(value: Sequence[float], most: float, where: str) -> tuple[float, float]:
    """`value` as (low, high), 0 < low <= high <= most, or a UserError that names the key."""
    pair = tuple(value)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
        shown = ', '.join(map(str, pair))
        raise config.UserError(f'{where}: got ({shown}); expected 0 < low <= high <= {most}.')
    return pair
