"""Colours as classes (Zhang et al. 2016, https://arxiv.org/abs/1603.08511).

Dimension key: Q bins, k of them near a colour; `...` batch and places.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax.augment import lab

GRID = 10.0  # sides of a square in ab


@functools.cache
def bins(grid: float = GRID) -> np.ndarray:
    """Centres of the bins of ab, [Q, 2] float32, by a first, then by b.

    A point of the grid is one if a colour of 8-bit sRGB lies in one of the four squares that meet
    there. So the nearest centre of a colour is a corner of its own square. Paper: 313, by a rule
    that it does not say; here: 309 of the same grid.

    Args:
        grid: sides of the squares.
    """
    # The surface of the RGB cube has all ab there are: along L every colour leads to it.
    level = np.linspace(0, 1, 256)
    u, v = (x.ravel() for x in np.meshgrid(level, level))
    faces = [
        np.insert(np.stack([u, v], 1), axis, value, axis=1) for axis in range(3) for value in (0, 1)
    ]
    ab = lab.rgb_to_lab(np.concatenate(faces), np)[:, 1:]
    corner = np.unique(np.floor(ab / grid).astype(int), axis=0)
    around = np.asarray([(0, 0), (0, 1), (1, 0), (1, 1)])
    points = np.unique((corner[:, None] + around).reshape(-1, 2), axis=0)
    return (points * grid).astype(np.float32)


def soft_encoding(
    ab: jax.Array, centres_Q2: np.ndarray, *, neighbours: int = 5, sigma: float = 5.0
) -> jax.Array:
    """Colours as distributions over the bins, [..., Q]: exp(−d² / 2σ²) of the k nearest, summing
    to 1.

    Args:
        ab: [..., 2].
        centres_Q2: of the bins.
        neighbours: k, from 1; 1 is one-hot. Paper: 5; authors' code: 10.
        sigma: σ, > 0.
    """
    a, b = (x.reshape((1,) * (ab.ndim - 1) + (-1,)) for x in centres_Q2.T)
    square = (ab[..., :1] - a) ** 2 + (ab[..., 1:] - b) ** 2
    near, place = jax.lax.top_k(-square, neighbours)
    weight = jax.nn.softmax(near / (2 * sigma**2), axis=-1)
    # Else XLA's CPU compiler computes the softmax again for each bin.
    weight, place = jax.lax.optimization_barrier((weight, place))
    number = jnp.arange(a.size).reshape(a.shape)
    parts = [
        jnp.where(place[..., i : i + 1] == number, weight[..., i : i + 1], 0.0)
        for i in range(neighbours)
    ]
    return sum(parts[1:], parts[0])


def class_weights(
    prior_Q: jax.Array, centres_Q2: np.ndarray, *, uniform: float = 0.5, sigma: float = 5.0
) -> jax.Array:
    """Weights of the bins that make up for rare ones, [Q] (eq. 4): w ∝ 1 / ((1 − λ) p̃ + λ / Q).

    p̃ is the prior, smoothed over the bins by a Gaussian; Σ p̃ w = 1, so that the mean weight of a
    pixel is about 1.

    Args:
        prior_Q: share of the pixels in each bin.
        centres_Q2: of the bins.
        uniform: λ, in (0, 1]; 1: all weights are 1.
        sigma: of the Gaussian, in ab.
    """
    smooth_QQ = _smoothing(centres_Q2, sigma)
    smooth_Q = jnp.sum(smooth_QQ * prior_Q[None], axis=1)
    weight_Q = 1 / ((1 - uniform) * smooth_Q + uniform / len(centres_Q2))
    return weight_Q / jnp.sum(smooth_Q * weight_Q)


def _smoothing(centres_Q2: np.ndarray, sigma: float) -> np.ndarray:
    """Shares of each bin (column) that go to each (row): columns sum to 1."""
    square = ((centres_Q2[:, None] - centres_Q2[None]) ** 2).sum(-1)
    weight = np.exp(-np.float64(square) / (2 * sigma**2))
    return (weight / weight.sum(0)).astype(np.float32)


def annealed_mean(logits: jax.Array, centres_Q2: np.ndarray, temperature: float) -> jax.Array:
    """The colours that distributions stand for, [..., 2] (eq. 5).

    Args:
        logits: [..., Q].
        centres_Q2: of the bins.
        temperature: T, > 0: 1 is the mean, which is sepia; towards 0 it becomes the mode, vivid
            and not consistent from place to place.
    """
    share = jax.nn.softmax(logits / temperature, axis=-1)
    return jnp.matmul(share, jnp.asarray(centres_Q2), precision='highest')
