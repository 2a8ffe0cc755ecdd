"""Learned positions of a file for the grid and the tokens that an encoder of ours has."""

import math

import jax
import numpy as np

from contrastive_jax.config import UserError


def split(origin: str, table_TD: np.ndarray, cls: int, registers: int) -> tuple[int, int]:
    """`(before, side)`: how many positions come before those of the patches, and the grid's side.

    Files have positions of CLS and registers, of CLS alone, or of the patches alone.

    Raises:
        UserError: the grid is not square in any of these.
    """
    for before in (cls, 0, cls + registers):
        side = math.isqrt(max(0, len(table_TD) - before))
        if side and side**2 + before == len(table_TD):
            return before, side
    raise UserError(f'{origin}: {len(table_TD)} learned positions are of no square grid.')


def adapt(
    table_TD: np.ndarray,
    registers_RD: np.ndarray,
    *,
    cls: int,
    before: int,
    side: int,
    antialias: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [cls + side², D] of CLS and patches, and the registers with theirs added.

    Args:
        table_TD: of the file.
        registers_RD: of the file, none of them or all.
        cls: 1 where there is a CLS token, else 0.
        before: see `split`.
        side: of the new grid.
        antialias: see `resample`.
    """
    first, patches = table_TD[:before], table_TD[before:]
    old = math.isqrt(len(patches))
    grid = resample(patches.reshape(old, old, -1), side, antialias)
    of_cls = first[:cls] if before else np.zeros((cls, table_TD.shape[1]), np.float32)
    if before > cls:
        registers_RD = registers_RD + first[cls:]
    return np.concatenate([of_cls, grid.reshape(side * side, -1)]), registers_RD


def resample(grid_SSD: np.ndarray, side: int, antialias: bool) -> np.ndarray:
    """A square grid at another resolution, bicubic as torch's `interpolate`.

    Args:
        grid_SSD: float32.
        side: of the result.
        antialias: with a low-pass filter where it shrinks, and Keys' kernel with a = -1/2 (timm);
            else a = -3/4, and edges repeated (DINO, DINOv2, Hugging Face).
    """
    old = len(grid_SSD)
    if side == old:
        return grid_SSD
    if antialias:
        shape = (side, side, grid_SSD.shape[2])
        return np.asarray(jax.image.resize(grid_SSD, shape, 'bicubic', antialias=True))
    weights = np.zeros((side, old))
    centre = (np.arange(side) + 0.5) * old / side - 0.5
    for tap in range(-1, 3):
        place = np.floor(centre) + tap
        x, a = np.abs(centre - place), -0.75
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        column = np.clip(place, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(side), column), np.where(x <= 1, near, far))
    return np.einsum('rs,ct,std->rcd', weights, weights, grid_SSD).astype(np.float32)
