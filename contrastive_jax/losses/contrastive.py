"""Contrastive losses as reductions of `similarity.logsumexp`.

Call them on the whole batch: under `jax.set_mesh(mesh)` with rows sharded on the mesh's first axis
every device's rows meet every other device's. Embeddings come in unnormalised, in any floating
dtype; similarities are cosines, computed and accumulated in float32.

B: pairs, K: negatives, D: embedding dimensions.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from contrastive_jax import similarity
from contrastive_jax.similarity import TILE


def normalize(x_BD: jax.Array) -> jax.Array:
    """Rows of Euclidean length 1, float32. A row shorter than 1e-15 becomes 0, with gradient 0."""
    x_BD = x_BD.astype(jnp.float32)
    square_B1 = jnp.sum(jnp.square(x_BD), axis=-1, keepdims=True)
    # Below, squares leave float32's range and a direction means nothing. The inner `where` keeps
    # 0 · ∞ out of the gradient.
    counts_B1 = square_B1 > 1e-30
    scale_B1 = lax.rsqrt(jnp.where(counts_B1, square_B1, 1.0))
    return x_BD * jnp.where(counts_B1, scale_B1, 0.0)


def inner(rows_mD: jax.Array, bank_nD: jax.Array) -> jax.Array:
    """All inner products [m, n], in full float32 also where the hardware's default is less."""
    return jnp.einsum('md,nd->mn', rows_mD, bank_nD, precision=lax.Precision.HIGHEST)


def nt_xent(
    view_a_BD: jax.Array, view_b_BD: jax.Array, *, temperature: float | jax.Array, tile: int = TILE
) -> jax.Array:
    """NT-Xent over the 2B views of the global batch (SimCLR, Chen et al. 2020, eq. 1, Alg. 1).

    `−log exp(s_ip / τ) / Σ_{k ≠ i} exp(s_ik / τ)` with s the cosine and p the other view of i's
    image; the mean over all 2B views. (The authors' TensorFlow code sums the two directions: its
    loss is twice this.)

    Args:
        view_a_BD, view_b_BD: embeddings of two views, row-aligned; need not be normalised.
        temperature: τ > 0.
        tile: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0; 0 for B = 1, where there are no negatives.
    """
    _check_pairs('nt_xent', view_a_BD, view_b_BD)
    _check_temperature('nt_xent', temperature)
    a_BD, b_BD = normalize(view_a_BD), normalize(view_b_BD)
    # (b v), not (v b): rows of one image stay on one device, so nothing moves.
    z_RD = rearrange(jnp.stack([a_BD, b_BD], axis=1), 'b v d -> (b v) d')
    image_R = jnp.arange(z_RD.shape[0], dtype=jnp.int32) // 2

    def negatives(row, bank):
        same_mn = row['image'][:, None] == bank['image'][None, :]  # itself and its positive
        scores_mn = inner(row['z'], bank['z']) / temperature
        return jnp.where(same_mn, -jnp.inf, scores_mn)

    views = {'z': z_RD, 'image': image_R}
    negatives_R = similarity.logsumexp(negatives, views, views, tile=tile)
    positive_B = jnp.sum(a_BD * b_BD, axis=-1) / temperature
    # log(e^p + e^n) − p = softplus(n − p), which keeps its digits also when the loss is near 0.
    return jnp.mean(jax.nn.softplus(negatives_R.reshape(-1, 2) - positive_B[:, None]))


def info_nce(
    query_BD: jax.Array,
    positive_BD: jax.Array,
    negatives_KD: jax.Array,
    *,
    temperature: float | jax.Array,
    tile: int = TILE,
) -> jax.Array:
    """InfoNCE with one positive and K shared negatives a query (van den Oord et al. 2018, eq. 4;
    MoCo, He et al. 2020, eq. 1).

    `−log exp(q·p / τ) / (exp(q·p / τ) + Σ_k exp(q·n_k / τ))` on cosines, the mean over queries.

    Args:
        query_BD, positive_BD: embeddings, row-aligned; need not be normalised.
        negatives_KD: embeddings that count for every query (a queue); need not be normalised.
        temperature: τ > 0.
        tile: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0.
    """
    _check_pairs('info_nce', query_BD, positive_BD)
    _check_temperature('info_nce', temperature)
    if negatives_KD.ndim != 2 or negatives_KD.shape[1] != query_BD.shape[1]:
        raise ValueError(
            f'info_nce: negatives_KD must be [K, {query_BD.shape[1]}] as the queries are, '
            f'got {negatives_KD.shape}'
        )
    query_BD, positive_BD = normalize(query_BD), normalize(positive_BD)

    def score(query, negative):
        return inner(query, negative) / temperature

    negatives_B = similarity.logsumexp(score, query_BD, normalize(negatives_KD), tile=tile)
    positive_B = jnp.sum(query_BD * positive_BD, axis=-1) / temperature
    return jnp.mean(jax.nn.softplus(negatives_B - positive_B))


def _check_pairs(loss: str, a_BD: jax.Array, b_BD: jax.Array) -> None:
    if a_BD.ndim != 2 or a_BD.shape != b_BD.shape:
        raise ValueError(
            f'{loss}: expected two row-aligned arrays of equal shape [B, D], '
            f'got {a_BD.shape} and {b_BD.shape}'
        )


def _check_temperature(loss: str, temperature: float | jax.Array) -> None:
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f'{loss}: temperature must be > 0, got {temperature}')
