"""Operations that move or remove pixels: rotate90, cutout. Crop and flip are the host's.

Shapes: B batch, V views, C=3 channels, H=W side.
Each function checks its options and returns the operation, see options.Apply.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from contrastive_jax.augment.color import spread
from contrastive_jax.augment.options import Apply, Frame, chance, interval, number


def rotate90(frame: Frame, *, prob: float | Sequence[float]) -> Apply:
    """Rotation by 90, 180 or 270 degrees, equally likely.

    Args:
        frame: of the operation.
        prob: probability that an image is rotated, in [0, 1]; a number or one a view.
    """
    coin = chance(prob, frame)

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        return rotate_by(x, jnp.where(coin(draw), 1 + jnp.floor(3 * draw[..., 1]), 0))

    return apply


def rotate_by(x_BVCHW: jax.Array, turns_BV: jax.Array) -> jax.Array:
    """Rotates each image by its own number of quarter turns, 0..3, the way np.rot90 does."""
    turns = spread(turns_BV, x_BVCHW)
    quarter = x_BVCHW.swapaxes(3, 4)[..., ::-1, :]
    x_BVCHW = jnp.where(turns % 2 == 1, quarter, x_BVCHW)
    return jnp.where(turns >= 2, x_BVCHW[..., ::-1, ::-1], x_BVCHW)


def cutout(
    frame: Frame,
    *,
    prob: float | Sequence[float],
    size: float | Sequence[float] = (0.25, 0.5),
    fill: float = 0.0,
) -> Apply:
    """Fills a square whose centre is any pixel; what lies outside the image is lost.

    DeVries & Taylor 2017 (one fixed size); SimCLR's paper states none.

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
        size: range of the square's side as a fraction of the image's, in [0, 1].
        fill: value of the filled pixels, in [0, 1].
    """
    coin = chance(prob, frame)
    low, high = interval('size', size, frame, 0, 1)
    fill = number('fill', fill, frame, 0, 1)

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        side_BV = jnp.round((low + (high - low) * draw[..., 1]) * frame.size)
        side_BV = jnp.where(coin(draw), side_BV, 0)
        pixel = jnp.arange(frame.size)[None, None, :]

        def covered(draw_BV: jax.Array) -> jax.Array:
            start = jnp.floor(draw_BV * frame.size) - side_BV // 2
            return (pixel >= start[..., None]) & (pixel < (start + side_BV)[..., None])

        rows_BVH, columns_BVW = covered(draw[..., 2]), covered(draw[..., 3])
        hole = rows_BVH[:, :, None, :, None] & columns_BVW[:, :, None, None, :]
        return jnp.where(hole, fill, x)

    return apply
