"""Images in Lab, in which colour can be taken away from lightness and asked for.

Crops, flips and augmentations are those of `images`, in RGB; Lab comes last, on the device.

Dimension key: B batch, V views, S size.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from contrastive_jax import figures
from contrastive_jax.augment import lab
from contrastive_jax.inputs import Batch, Inputs, Transform, images


def make(
    *,
    size: int,
    views: int = 1,
    view_size: int = 0,
    crop: Mapping[str, Any] | None = None,
    crop_fraction: float = 1.0,
    augment: Mapping[str, Any] | None = None,
) -> Inputs:
    """Records with 'image' [H, W, 3] uint8 of any sizes, for networks that see (L − 50, a, b) / 50.

    A training batch has 'views' [B, V, S, S, 3] and 'lab', the same in Lab's own units; an
    evaluation batch 'image' [B, S, S, 3].

    Args:
        size: S of the images that evaluators and users give to the encoder, pixels.
        views: V, random crops of each image.
        view_size: S of these; 0: size.
        crop, crop_fraction, augment: as in `images.make`.

    Raises:
        UserError: an option that is unknown or out of range.
    """
    rgb = images.make(
        size=size,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        views=views,
        view_size=view_size,
        crop=crop,
        crop_fraction=crop_fraction,
        augment=augment,
    )

    def in_lab(x: jax.Array) -> jax.Array:
        # Else XLA's CPU compiler computes it again wherever a convolution meets a pixel.
        return jax.lax.optimization_barrier(lab.rgb_to_lab(x))

    def seen(transform: Transform, name: str) -> Transform:
        def device(key: jax.Array, batch: Batch) -> Batch:
            batch = transform.device(key, batch)
            return {**batch, name: lab.scaled(in_lab(batch[name]))}

        return transform._replace(device=device)

    def train(key: jax.Array, batch: Batch) -> Batch:
        batch = rgb.train.device(key, batch)
        colours = in_lab(batch['views'])
        return {**batch, 'views': lab.scaled(colours), 'lab': colours}

    def show(batch: Batch) -> bytes:
        return figures.views_grid(lab.lab_to_rgb(np.asarray(batch['lab']), np))

    return rgb._replace(
        train=rgb.train._replace(device=train),
        eval=seen(rgb.eval, 'image'),
        tune=seen(rgb.tune, 'views'),
        show=show,
    )
