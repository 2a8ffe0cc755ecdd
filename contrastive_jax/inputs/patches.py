"""Square tiles of images in the order of their grid, for tasks that ask where a tile belongs.

Tiles are cut on the host from a crop that is resized once from the original resolution. What would
give their places away is taken from them here: edges that run on (a gap between tiles, and jitter),
chromatic aberration (`colour`), brightness (`standardise`). Doersch et al. 2015, arXiv:1505.05192,
section 3.1; Noroozi and Favaro 2016, arXiv:1603.09246, section 3.

Dimension key: B batch, N tiles, t side of a tile, S size, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from contrastive_jax import augment as augmentation
from contrastive_jax import figures
from contrastive_jax.config import UserError, check_range, choose
from contrastive_jax.data import Record
from contrastive_jax.inputs import Batch, Inputs, Row, Transform, geometry, images

# Of green against magenta, along which lenses displace colours (Doersch et al., section 3.1).
MAGENTA = np.asarray([[-1.0, 2.0, -1.0]], np.float32)


def make(
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    region: int,
    tile: int,
    jitter: int,
    grid: int = 3,
    colour: str = 'drop',
    standardise: bool = True,
    crop: Mapping[str, Any] | None = None,
    crop_fraction: float = 1.0,
    augment: Mapping[str, Any] | None = None,
) -> Inputs:
    """Records with 'image' [H, W, 3] uint8 of any sizes.

    A training batch has 'views' [B, N, t, t, 3], N = grid², row by row; so has one for a method's
    task on held-out records, there from the centre of the image and without jitter. An evaluation
    batch has 'image' [B, S, S, 3], standardised as a whole where tiles are one by one.

    Args:
        size: S of the images that evaluators and users give to the encoder, pixels.
        mean, std: of each channel, in units of [0, 1].
        region: side of the crop that tiles are cut from, pixels. Each has a cell of
            region // grid.
        tile: t, pixels. The mean gap between two tiles is the side of a cell less t.
        jitter: how far a tile may be from the middle of its cell, pixels: at most half the gap.
        grid: tiles in a row and in a column, at least 2.
        colour: 'drop': of each tile one channel at random is kept, in the middle of its values, and
            the others are noise of a hundredth of its deviation; 'project': what differs between
            green and magenta is taken out, of evaluators' images too; 'keep': nothing.
        standardise: each tile has mean 0 and deviation 1 over its pixels and channels, a flat one
            zeros.
        crop: keywords of geometry.random_resized_crop.
        crop_fraction: evaluators resize the shorter side to size / crop_fraction, then crop.
        augment: operation -> options, see `augment.make`; each tile draws its own.

    Raises:
        UserError: an option that is unknown or out of range.
    """
    where = 'config.inputs'
    check_range(where, {'grid': grid}, least=2, whole=True)
    check_range(where, {'tile': tile, 'region': region}, least=1, whole=True)
    choose('colour', colour, COLOURS, f'{where}.colour')
    cell, count = region // grid, grid**2
    if tile > cell:
        raise UserError(f'{where}.tile: got {tile}; a cell of {region} // {grid} has {cell}.')
    check_range(where, {'jitter': jitter}, least=0, most=(cell - tile) // 2, whole=True)
    options = geometry.crop_options(crop or {}, f'{where}.crop')
    how = options.get('interpolation', 'bicubic')
    whole = images.make(
        size=size, mean=mean, std=std, crop=crop, crop_fraction=crop_fraction, views=1
    )
    shapes = {'views': jax.ShapeDtypeStruct((count, tile, tile, 3), jnp.uint8)}

    def cut(square: np.ndarray, shift_N2: np.ndarray) -> Row:
        spare = (region - cell * grid) // 2 + (cell - tile) // 2
        found = np.empty((count, tile, tile, 3), np.uint8)
        for i, (down, right) in enumerate(shift_N2):
            top, left = spare + cell * (i // grid) + down, spare + cell * (i % grid) + right
            found[i] = square[top : top + tile, left : left + tile]
        return {'views': found}

    def drawn(record: Record, rng: np.random.Generator) -> Row:
        picture = Image.fromarray(record['image'])
        square = geometry.random_resized_crop(picture, rng, region, **options)
        return cut(square, rng.integers(-jitter, jitter + 1, (count, 2)))

    def middle(record: Record, rng: Any) -> Row:
        del rng
        square = geometry.center_crop_resize(record['image'], region, crop_fraction, how)
        return cut(square, np.zeros((count, 2), int))

    def tiles(spec: Mapping[str, Any]) -> Callable[[jax.Array, Batch], Batch]:
        device = augmentation.make(
            spec, views=count, image_size=tile, mean=mean, std=std, where=f'{where}.augment'
        )

        def defended(key: jax.Array, batch: Batch) -> Batch:
            # The task's device function is given no key, but the same one each time.
            key = jax.random.key(0) if key is None else key
            found = device(key, batch)
            x = COLOURS[colour](jax.random.fold_in(key, 3), found['views'])
            return {**found, 'views': standardised(x) if standardise else x}

        return defended

    def seen(of_images: Transform, name: str) -> Transform:
        """Whole images as an encoder of such tiles is to see them."""

        def device(key: Any, batch: Batch) -> Batch:
            found = of_images.device(key, batch)
            x = project(None, found[name]) if colour == 'project' else found[name]
            return {**found, name: standardised(x) if standardise else x}

        return of_images._replace(device=device)

    def show(batch: Batch) -> bytes:
        # Of tiles that are standardised the colours are not what they were.
        x = np.asarray(batch['views'])
        return figures.views_grid((0.5 + x / 5 if standardise else x * std + mean).clip(0, 1))

    return whole._replace(
        train=Transform(drawn, shapes, tiles(augment or {})),
        eval=seen(whole.eval, 'image'),
        tune=seen(whole.tune, 'views'),
        task=Transform(middle, shapes, tiles({})),
        show=show,
    )


def keep(key: Any, x: jax.Array) -> jax.Array:
    """As it is."""
    del key
    return x


def drop(key: jax.Array, x_BNttC: jax.Array) -> jax.Array:
    """One channel of each tile, centred, and noise in the place of the others."""
    which_key, noise_key = jax.random.split(key)
    which_BN = jax.random.randint(which_key, x_BNttC.shape[:2], 0, x_BNttC.shape[-1])
    kept = jax.nn.one_hot(which_BN, x_BNttC.shape[-1])[:, :, None, None]
    centred = x_BNttC - x_BNttC.mean((2, 3), keepdims=True)
    deviation = jnp.sqrt((kept * centred**2).sum(-1, keepdims=True).mean((2, 3), keepdims=True))
    noise = deviation / 100 * jax.random.normal(noise_key, x_BNttC.shape)
    return kept * centred + (1 - kept) * noise


def project(key: Any, x: jax.Array) -> jax.Array:
    """Colours without what differs between green and magenta: x (I − aᵀa / aaᵀ)."""
    del key
    a = jnp.asarray(MAGENTA)
    return x @ (jnp.eye(3) - a.T @ a / (a @ a.T))


COLOURS: Mapping[str, Callable[[Any, jax.Array], jax.Array]] = {
    'keep': keep,
    'drop': drop,
    'project': project,
}


def standardised(x: jax.Array) -> jax.Array:
    """Images [..., t, t, C] each with mean 0 and deviation 1; a flat one is zeros."""
    axes = -3, -2, -1
    centred = x - x.mean(axes, keepdims=True)
    variance = (centred**2).mean(axes, keepdims=True)
    return centred * jnp.where(variance > 1e-8, jax.lax.rsqrt(jnp.maximum(variance, 1e-8)), 0.0)
