"""Images: random crops of them for training, the centre square for evaluation.

Geometry happens on the host, where the original resolution is; colours and filters on the device
(`augment`). Hosts ship uint8.

Dimension key: B batch, V views, L local views, S size, H W image.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from contrastive_jax import augment as augmentation
from contrastive_jax import figures
from contrastive_jax.config import check_range
from contrastive_jax.data import BadRecord, Record, decode
from contrastive_jax.inputs import Batch, Inputs, Row, Transform, geometry

BASELINE_SIDE = 16  # pixels of the raw-pixel baseline, at most


def make(
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    views: int = 2,
    view_size: int = 0,
    crop: Mapping[str, Any] | None = None,
    local_views: int = 0,
    local_size: int = 96,
    local_scale: Sequence[float] = (0.05, 0.4),
    crop_fraction: float = 1.0,
    augment: Mapping[str, Any] | None = None,
) -> Inputs:
    """Records with 'image' [H, W, 3] uint8 of any sizes.

    A training batch has 'views' [B, V, S, S, 3] and, with local views, 'local_views'
    [B, L, s, s, 3]; an evaluation batch 'image' [B, S, S, 3].

    Args:
        size: S of the images that evaluators and users give to the encoder, pixels.
        mean, std: of each channel, in units of [0, 1]; networks see (pixel / 255 − mean) / std.
        views: V, random crops of each image.
        view_size: S of these; 0: size.
        crop: keywords of geometry.random_resized_crop: scale, ratio, interpolation, flip,
            pad.
        local_views: L, further crops of each image (multi-crop, Caron et al. 2020,
            arXiv:2006.09882, section 3.2). They are drawn after the others, which stay the same.
        local_size: s of these, pixels.
        local_scale: smallest and largest share of the area of these; the rest is as `crop` says.
        crop_fraction: evaluators resize the shorter side to size / crop_fraction, then crop.
        augment: operation -> options, see `augment.make`.

    Raises:
        UserError: an option that is unknown or out of range.
    """
    where = 'config.inputs'
    ones = {'size': size, 'views': views, 'local_size': local_size}
    check_range(where, ones, least=1, whole=True)
    zeros = {'view_size': view_size, 'local_views': local_views}
    check_range(where, zeros, least=0, whole=True)
    check_range(where, {'crop_fraction': crop_fraction}, above=0, most=1)
    options = geometry.crop_options(crop or {}, f'{where}.crop')
    scale = geometry.span(local_scale, 1.0, f'{where}.local_scale')
    side = view_size or size
    interpolation = options.get('interpolation', 'bicubic')

    def training(count: int, local: int, spec: Mapping[str, Any]) -> Transform:
        def host(record: Record, rng: np.random.Generator) -> Row:
            picture = Image.fromarray(record['image'])

            def crops(n: int, side: int, **how: Any) -> np.ndarray:
                x_NHWC = np.empty((n, side, side, 3), np.uint8)
                for i in range(n):
                    x_NHWC[i] = geometry.random_resized_crop(picture, rng, side, **how)
                return x_NHWC

            row = {'views': crops(count, side, **options)}
            if local:
                row['local_views'] = crops(local, local_size, **{**options, 'scale': scale})
            return row

        shapes = {'views': (count, side, side, 3)}
        if local:
            shapes['local_views'] = (local, local_size, local_size, 3)
        device = augmentation.make(
            spec,
            views=count,
            image_size=side,
            mean=mean,
            std=std,
            local_views=local,
            local_size=local_size,
            where=f'{where}.augment',
        )
        return Transform(host, _uint8(shapes), device)

    def square(record: Record, rng: Any) -> Row:
        del rng
        x = geometry.center_crop_resize(record['image'], size, crop_fraction, interpolation)
        return {'image': x}

    def normalize(key: Any, batch: Batch) -> Batch:
        del key
        return {**batch, 'image': augmentation.normalize(batch['image'], mean, std)}

    def show(batch: Batch) -> bytes:
        shown = {
            name: np.asarray(batch[name]) * np.asarray(std) + np.asarray(mean)
            for name in ('views', 'local_views')
            if name in batch
        }
        return figures.views_grid(shown['views'], local_BLHWC=shown.get('local_views'))

    return Inputs(
        train=training(views, local_views, augment or {}),
        eval=Transform(square, _uint8({'image': (size, size, 3)}), normalize),
        tune=training(1, 0, {}),
        baseline=pixels,
        reads=('image',),
        record=given,
        show=show,
    )


def pixels(batch: Batch) -> jax.Array:
    """Normalised pixels [B, D], at most BASELINE_SIDE² of them.

    Cosines of pixels that are all positive say little, and all pixels of a photograph would not
    fit.
    """
    images = batch['image']
    side = min(images.shape[1], BASELINE_SIDE)
    images = jax.image.resize(images, (images.shape[0], side, side, 3), 'linear')
    return images.reshape(images.shape[0], -1)


def given(image: Any) -> Record:
    """The record of an image that a user gives: uint8 [H, W, 3], or the path of a file.

    Raises:
        BadRecord: no such file, not a JPEG, PNG or WebP file, damaged; another kind of array.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            image = decode.decode(epath.Path(image).read_bytes())
        except OSError as error:
            raise BadRecord(error.strerror or str(error)) from error
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        got = f'{image.dtype} {list(image.shape)}'
        raise BadRecord(f'got {got}, expected uint8 [H, W, 3].')
    return {'image': image, 'label': -1}


def _uint8(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.uint8) for name, shape in shapes.items()}
