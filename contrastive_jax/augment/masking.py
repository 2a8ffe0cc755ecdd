"""Which patches of an image are hidden from the encoder: masks in blocks, drawn on the device.

B batch, H W rows and columns of patches, N = H W patches, K blocks of at most M patches, n patches
in view.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from contrastive_jax.augment.options import Frame, interval, number
from contrastive_jax.config import UserError

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


class Blocks(NamedTuple):
    """Masks of `multi_block`. Patches are numbers in row-major order.

    Attributes:
        context: int32 [B, n], patches that the encoder sees, in no order.
        targets: int32 [B, K, M], patches of each block, row by row.
        counts: bool [M], whether these are patches of the block: it has a size of its own in each
            step. The others repeat its first.
    """

    context: jax.Array
    targets: jax.Array
    counts: jax.Array


def multi_block(
    key: jax.Array,
    batch: int,
    rows: int,
    columns: int,
    *,
    blocks: int = 4,
    scale: Sequence[float] = (0.15, 0.2),
    aspect: Sequence[float] = (0.75, 1.5),
    context: Sequence[float] = (0.85, 1.0),
) -> Blocks:
    """I-JEPA's masks: blocks that are to be predicted, and a context without them.

    All blocks of a batch have one size and places of their own; they may overlap. Patches in view
    are drawn from a square block that no target is in; where these are too few, from the rest.

    Paper: the context is all of that; authors' code: its first patches, as many as the image of the
    batch has that has the fewest; here: a fixed number at random, n = N − K M, which every image
    has, because shapes on the device are fixed. Authors' code: blocks are never in the last row
    and column, and one number decides scale and aspect; here, as in the paper: they are anywhere,
    and the size is any whole one within both ranges.

    Args:
        key: of the draws.
        batch: B.
        rows, columns: of the grid of patches.
        blocks: K, at least 1.
        scale: range of a block's share of the patches, in (0, 1].
        aspect: range of its height over its width, above 0.
        context: range of the context block's share, in (0, 1].

    Raises:
        UserError: a value outside its range; a grid too small for as many blocks.

    Source: I-JEPA (Assran et al. 2023, arXiv:2301.08243, section 3 and appendix A).
    """
    frame = Frame('multi_block', 1, rows)
    for name, value in (('rows', rows), ('columns', columns), ('blocks', blocks)):
        number(name, value, frame, 1)
    shares = [interval(k, v, frame, 1e-3, 1) for k, v in (('scale', scale), ('context', context))]
    shape = interval('aspect', aspect, frame, 1e-2, 100)
    sizes = np.array(block_sizes(rows, columns, shares[0], shape))
    squares = np.array(block_sizes(rows, columns, shares[1], (1, 1)))
    N, M = rows * columns, int(sizes.prod(axis=1).max())
    n = N - blocks * M
    if n < 1:
        raise UserError(
            f'multi_block: got {blocks} blocks of up to {M} patches and a grid of {rows} x '
            f'{columns}, of which they can hide all; use smaller patches or fewer blocks.'
        )
    keys = jax.random.split(key, 4)
    size = jnp.asarray(sizes)[jax.random.randint(keys[0], (), 0, len(sizes))]
    square = jnp.asarray(squares)[jax.random.randint(keys[1], (), 0, len(squares))]
    grid = jnp.array([rows, columns])
    extent = jnp.stack([size] * blocks + [square])[None]  # [1, K + 1, 2]
    first = jax.random.uniform(keys[2], (batch, blocks + 1, 2)) * (grid[None, None] - extent + 1)
    first = jnp.floor(first).astype(jnp.int32)

    row, column = jnp.divmod(jnp.arange(N), columns)
    at = jnp.stack([row, column], axis=1)[None, None]  # [1, 1, N, 2]
    within = jnp.all(
        (at >= first[:, :, None]) & (at < (first + extent)[:, :, None]), axis=3
    )  # [B, K + 1, N]
    target, away = within[:, :blocks].any(axis=1), ~within[:, blocks]
    # Below 1 in the context, below 2 outside of it, above 2 what is to be predicted.
    rank = jax.random.uniform(keys[3], (batch, N)) + away + 2 * target
    seen = jnp.argsort(rank, axis=1)[:, :n].astype(jnp.int32)

    down, right = jnp.divmod(jnp.arange(M), size[1])
    counts = jnp.arange(M) < size[0] * size[1]
    inside = jnp.where(counts, down * columns + right, 0)
    corner = first[:, :blocks, 0] * columns + first[:, :blocks, 1]
    return Blocks(seen, corner[:, :, None] + inside[None, None].astype(jnp.int32), counts)


def block_sizes(
    rows: int, columns: int, scale: Sequence[float], aspect: Sequence[float]
) -> list[tuple[int, int]]:
    """Heights and widths in whole patches within both ranges, or else those nearest to them.

    >>> block_sizes(8, 8, (0.15, 0.2), (0.75, 1.5))
    [(3, 4), (4, 3)]
    """

    def beyond(value: float, span: Sequence[float]) -> float:
        """By which factor a value is outside, as a logarithm; 0 within."""
        return max(math.log(span[0] / value), math.log(value / span[1]), 0.0)

    away = {
        (h, w): beyond(h * w / (rows * columns), scale) + beyond(h / w, aspect)
        for h in range(1, rows + 1)
        for w in range(1, columns + 1)
    }
    nearest = min(away.values()) + 1e-9
    return [size for size, distance in away.items() if distance <= nearest]
