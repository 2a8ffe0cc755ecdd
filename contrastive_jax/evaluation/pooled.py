"""From a map of features to a row of a few thousand numbers, for linear probes of any layer.

B: batch, h w: a map, C: its channels, N: patches.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax.config import UserError

DIMENSIONS = 9216  # that a map is pooled to, at most: 3 × 3 × 1024, or 6 × 6 × 256


def pooled(x: jax.Array, name: str, dimensions: int = DIMENSIONS) -> jax.Array:
    """An output of the encoder as rows [B, D].

    Args:
        x: [B, D], which stays as it is, or a map [B, h, w, C] or patches [B, h·h, C], see
            `evaluation.subject.Subject.features`.
        name: for errors.
        dimensions: the most that a map is averaged to, where one cell has not more.

    Raises:
        UserError: any other shape.

    Layers are compared at about 9,000 dimensions each: Zhang et al. 2016 (arXiv:1603.08511) and
    2017 (arXiv:1611.09842), who resize; Goyal et al. 2019 (arXiv:1905.01235), who average.
    """
    if x.ndim == 3 and math.isqrt(x.shape[1]) ** 2 == x.shape[1]:
        side = math.isqrt(x.shape[1])
        x = x.reshape(x.shape[0], side, side, x.shape[2])
    if x.ndim == 2:
        return x
    if x.ndim != 4:
        raise UserError(
            f'the output {name!r} is {["B", *x.shape[1:]]}; expected rows [B, D], a map '
            '[B, h, w, C] or patches [B, N, C] of a square grid.'
        )
    h, w, C = x.shape[1:]
    side = max(s for s in range(1, min(h, w) + 1) if s == 1 or s * s * C <= dimensions)
    return _averaged(x, _cells(side, h), _cells(side, w))


@jax.jit
def _averaged(x_BhwC: jax.Array, rows_sh: np.ndarray, columns_sw: np.ndarray) -> jax.Array:
    x = jnp.einsum('bhwc,sh,tw->bstc', x_BhwC, rows_sh, columns_sw, precision='highest')
    return x.reshape(x.shape[0], -1)


def _cells(count: int, length: int) -> np.ndarray:
    """[count, length] weights: means over cells that cover the length, overlapping by up to one."""
    start, place = np.arange(count) * length, np.arange(length)[None, :]
    inside = (place >= (start // count)[:, None]) & (place < -(-(start + length) // count)[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
