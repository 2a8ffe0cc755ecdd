"""Scores of two blocks of embeddings, for `similarity`, and what losses ask of their arguments.

m, n: items of the two blocks, D: embedding dimensions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def unit(x_BD: jax.Array) -> jax.Array:
    """Rows of Euclidean length 1, float32. A row shorter than 1e-15 becomes 0, with gradient 0.

    >>> [f'{x:.4f}' for x in unit(jnp.array([[3.0, 4.0]]))[0]]
    ['0.6000', '0.8000']
    """
    x_BD = x_BD.astype(jnp.float32)
    return x_BD * _inverse_length(x_BD)[:, None]


def items(x_BD: jax.Array) -> dict[str, jax.Array]:
    """Items for `cosine`: unit rows, or bfloat16 ones as they are and one over their length.

    Kept apart, a bfloat16 embedding is never rounded again, and travels as two bytes a number. With
    float32 a product is all that is left to do for a score, and for its gradient.
    """
    if x_BD.dtype != jnp.bfloat16:
        return {'z': unit(x_BD)}
    return {'z': x_BD, 'scale': _inverse_length(x_BD.astype(jnp.float32))}


def _inverse_length(x_BD: jax.Array) -> jax.Array:
    square_B = jnp.sum(jnp.square(x_BD), axis=-1)
    # Below, squares leave float32's range and a direction means nothing. The inner `where` keeps
    # 0 · ∞ out of the gradient.
    counts_B = square_B > 1e-30
    return jnp.where(counts_B, lax.rsqrt(jnp.where(counts_B, square_B, 1.0)), 0.0)


def inner(a_mD: jax.Array, b_nD: jax.Array, dtype: Any) -> jax.Array:
    """All inner products [m, n] of float32 blocks, accumulated in float32.

    Args:
        a_mD, b_nD: the blocks.
        dtype: that the values came in. Those of bfloat16 lose nothing in one pass of a matrix unit
            that takes bfloat16 (their gradients' weights are rounded to it there); others are
            multiplied in full float32, also where the hardware's default is less.
    """
    exact = jnp.dtype(dtype) == jnp.bfloat16
    precision = lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST
    return jnp.einsum('md,nd->mn', a_mD, b_nD, precision=precision)


def cosine(a: dict[str, jax.Array], b: dict[str, jax.Array], dtype: Any) -> jax.Array:
    """All cosines [m, n] of two blocks of `items`."""
    cosines_mn = inner(a['z'], b['z'], dtype)
    if 'scale' in a:
        cosines_mn = cosines_mn * a['scale'][:, None]
    return cosines_mn * b['scale'][None, :] if 'scale' in b else cosines_mn


def check_pairs(loss: str, a_BD: jax.Array, b_BD: jax.Array) -> None:
    """Raises ValueError unless both are [B, D] with the same B and D."""
    if a_BD.ndim != 2 or a_BD.shape != b_BD.shape:
        raise ValueError(
            f'{loss}: expected two row-aligned arrays of equal shape [B, D], '
            f'got {a_BD.shape} and {b_BD.shape}'
        )


def check_labels(loss: str, embeddings: jax.Array, labels_B: jax.Array) -> None:
    """Raises ValueError unless labels_B holds an integer for every leading row."""
    labels = jnp.asarray(labels_B)
    if labels.shape != embeddings.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f'{loss}: expected integer labels of shape {embeddings.shape[:1]}, one for each of the '
            f'embeddings {embeddings.shape}; got {labels.dtype} {labels.shape}'
        )


def check_positive(loss: str, name: str, value: float | jax.Array) -> None:
    """Raises ValueError for a number that is known while tracing and not above 0."""
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f'{loss}: {name} must be > 0, got {value}')
