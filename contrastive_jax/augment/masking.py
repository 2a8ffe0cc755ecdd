"""Which patches of an image are hidden from the encoder: masks in blocks, drawn on the device.

B batch, H W rows and columns of patches, N = H W patches.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.augment.options import Frame, interval, number

PROPOSALS = 32  # rectangles that are tried; with DINOv2's ratio and 14 x 14 patches enough


def block_mask(
    key: jax.Array,
    batch: int,
    rows: int,
    columns: int,
    *,
    ratio: float | Sequence[float] = (0.1, 0.5),
    prob: float = 0.5,
    min_patches: int = 4,
    aspect: float = 0.3,
) -> jax.Array:
    """Block-wise masks, each image's own.

    An image is masked with probability `prob`, a share of its patches that is uniform in `ratio`.
    Rectangles with an area uniform between `min_patches` and what is still wanted, and the
    logarithm of height over width uniform, are put down at random places as long as they do not
    cover more than is wanted. Patches at random make it exactly round(share * N).

    Args:
        key: of the draws; those of image i depend on the key and i alone.
        batch: B.
        rows, columns: of the grid of patches.
        ratio: range of the share, in [0, 1]; a number or a pair.
        prob: probability of an image, in [0, 1].
        min_patches: smallest area of a rectangle, at least 1.
        aspect: smallest height over width of a rectangle, in (0, 1]; the largest is 1 / aspect.

    Returns:
        bool [B, rows * columns], True where a patch is masked, in row-major order.

    Raises:
        UserError: a value outside its range.

    Source: BEiT (Bao et al. 2022, arXiv:2106.08254, Algorithm 1) with the defaults of DINOv2
    (Oquab et al. 2024, arXiv:2304.07193). Paper: rectangles until the number is reached or a
    number of trials fails; here: a fixed number of trials and single patches, because shapes on
    the device and losses want a known number. DINOv2 spreads the shares evenly over the masked
    images of a batch; here each is drawn, so that images do not depend on each other.
    """
    frame = Frame('block_mask', 1, rows)
    low, high = interval('ratio', ratio, frame, 0, 1)
    number('prob', prob, frame, 0, 1)
    for name, value in (('rows', rows), ('columns', columns), ('min_patches', min_patches)):
        number(name, value, frame, 1)
    log_aspect = math.log(number('aspect', aspect, frame, 1e-3, 1))
    row, column = jnp.arange(rows)[:, None], jnp.arange(columns)[None, :]

    def add_block(missing: jax.Array, mask_HW: jax.Array, draw: jax.Array) -> jax.Array:
        area = min_patches + draw[0] * jnp.maximum(missing - min_patches, 0)
        shape = jnp.exp((2 * draw[1] - 1) * log_aspect)  # height over width
        height, width = jnp.round(jnp.sqrt(area * shape)), jnp.round(jnp.sqrt(area / shape))
        top = jnp.floor(draw[2] * (rows - height + 1))
        left = jnp.floor(draw[3] * (columns - width + 1))
        inside_HW = (row >= top) & (row < top + height)
        inside_HW &= (column >= left) & (column < left + width)
        fits = (height <= rows) & (width <= columns) & (height * width >= min_patches)
        fits &= jnp.sum(inside_HW & ~mask_HW) <= missing
        return mask_HW | (inside_HW & fits)

    def one(key: jax.Array) -> jax.Array:
        # All draws of an image at once, because compiling each takes time.
        draws = jax.random.uniform(key, (2 + 4 * PROPOSALS + rows * columns,))
        first, blocks, single_N = jnp.split(draws, (2, 2 + 4 * PROPOSALS))
        wanted = jnp.round((low + (high - low) * first[1]) * rows * columns)
        wanted = jnp.where(first[0] < prob, wanted, 0)

        def step(mask_HW: jax.Array, draw: jax.Array) -> tuple[jax.Array, None]:
            return add_block(wanted - jnp.sum(mask_HW), mask_HW, draw), None

        nothing = jnp.zeros((rows, columns), jnp.bool_)
        mask_HW, _ = lax.scan(step, nothing, blocks.reshape(PROPOSALS, 4))
        mask_N = mask_HW.reshape(-1)
        # The ranks of the free patches' numbers: the lowest are taken.
        rank_N = jnp.argsort(jnp.argsort(jnp.where(mask_N, 2.0, single_N)))
        return mask_N | (rank_N < wanted - jnp.sum(mask_N))

    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))
    return jax.vmap(one)(keys)


def image_key(image: jax.Array) -> jax.Array:
    """A key that depends on one image [H, W, C] alone, not on its place in a batch."""
    return jax.random.fold_in(jax.random.key(0), jnp.sum(jnp.round(image * 64).astype(jnp.int32)))


def widened(mask_BHW: jax.Array, by: int) -> jax.Array:
    """Masks with all pixels that are at most `by` rows and columns away."""
    size = (1, 2 * by + 1, 2 * by + 1)
    x = mask_BHW.astype(jnp.float32)
    return lax.reduce_window(x, 0.0, lax.max, size, (1, 1, 1), 'SAME') > 0
