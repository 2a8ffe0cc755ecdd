"""Contrastive losses as reductions of `similarity`: softmax of scores.

Call them on the whole batch: under `jax.set_mesh(mesh)` with rows sharded on the mesh's first axis
every device's rows meet every other device's. Embeddings come in unnormalised, in any floating
dtype; scores are computed and accumulated in float32.

B: pairs, V: views, K: negatives or prototypes, D: embedding dimensions, R: rows, all views of all
images, or drawn prototypes.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import similarity
from contrastive_jax.losses.scores import (
    check_labels,
    check_pairs,
    check_positive,
    cosine,
    items,
    unit,
)
from contrastive_jax.similarity import TILE


def nt_xent(
    view_a_BD: jax.Array,
    view_b_BD: jax.Array,
    *,
    temperature: float | jax.Array,
    record_B: jax.Array | None = None,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """NT-Xent over the 2B views of the global batch (SimCLR, Chen et al. 2020, eq. 1, Alg. 1).

    `−log exp(s_ip / τ) / Σ_{k ≠ i} exp(s_ik / τ)` with s the cosine and p the other view of i's
    image; the mean over all 2B views. (The authors' TensorFlow code sums the two directions: its
    loss is twice this.)

    Args:
        view_a_BD, view_b_BD: embeddings of two views, row-aligned; need not be normalised.
        temperature: τ > 0.
        record_B: integers; views of one record are no negatives of each other. None: all differ.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0; 0 for B = 1, where there are no negatives.

    Raises:
        ValueError: shapes that differ, records that are no integers, a temperature that is not
            above 0.

    >>> f'{nt_xent(jnp.eye(2), jnp.eye(2), temperature=1.0):.4f}'
    '0.5514'
    """
    check_pairs('nt_xent', view_a_BD, view_b_BD)
    check_positive('nt_xent', 'temperature', temperature)
    # (b v), not (v b): rows of one image stay on one device, so nothing moves.
    z_RD = rearrange(jnp.stack([view_a_BD, view_b_BD], axis=1), 'b v d -> (b v) d')
    record_R = jnp.repeat(_records('nt_xent', view_a_BD, record_B), 2)
    views = {'record': record_R, **items(z_RD)}

    def negatives(row: dict, bank: dict) -> jax.Array:
        same_mn = row['record'][:, None] == bank['record'][None, :]  # itself and its positive
        return jnp.where(same_mn, -jnp.inf, cosine(row, bank, z_RD.dtype) / temperature)

    negatives_R = similarity.logsumexp_symmetric(negatives, views, tile=tile, exchange=exchange)
    positive_B = jnp.sum(unit(view_a_BD) * unit(view_b_BD), axis=-1) / temperature
    # log(e^p + e^n) − p = softplus(n − p), which keeps its digits also when the loss is near 0.
    return jnp.mean(jax.nn.softplus(negatives_R.reshape(-1, 2) - positive_B[:, None]))


def info_nce(
    query_BD: jax.Array,
    positive_BD: jax.Array,
    negatives_KD: jax.Array | None = None,
    *,
    temperature: float | jax.Array,
    record_B: jax.Array | None = None,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """InfoNCE with one positive and K shared negatives a query (van den Oord et al. 2018, eq. 4;
    MoCo, He et al. 2020, eq. 1).

    `−log exp(q·p / τ) / (exp(q·p / τ) + Σ_k exp(q·n_k / τ))` on cosines, the mean over queries.

    Args:
        query_BD, positive_BD: embeddings, row-aligned; need not be normalised.
        negatives_KD: embeddings that count for every query (a queue); need not be normalised. None:
            a query's negatives are the other queries' positives (NNCLR, Dwibedi et al. 2021, eq. 3;
            MoCo v3, Chen et al. 2021, eq. 1, where the authors' code multiplies by 2τ).
        temperature: τ > 0.
        record_B: integers; without a queue, pairs of one record are no negatives of each other.
            None: all differ.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0; 0 for B = 1 without a queue, where there are no negatives.

    Raises:
        ValueError: shapes that do not fit together, records that are no integers, a temperature
            that is not above 0.

    >>> f'{info_nce(jnp.eye(2), jnp.eye(2), temperature=1.0):.4f}'
    '0.3133'
    """
    check_pairs('info_nce', query_BD, positive_BD)
    check_positive('info_nce', 'temperature', temperature)
    record_B = _records('info_nce', query_BD, record_B)
    queries, bank = ({'record': record_B, **items(x)} for x in (query_BD, positive_BD))
    dtype = jnp.promote_types(query_BD.dtype, positive_BD.dtype)
    if negatives_KD is not None:
        _check_bank('info_nce', 'negatives', query_BD, negatives_KD)
        bank = items(negatives_KD)
        dtype = jnp.promote_types(query_BD.dtype, negatives_KD.dtype)

    def negatives(query: dict, negative: dict) -> jax.Array:
        scores_mn = cosine(query, negative, dtype) / temperature
        if negatives_KD is not None:
            return scores_mn
        same_mn = query['record'][:, None] == negative['record'][None, :]
        return jnp.where(same_mn, -jnp.inf, scores_mn)

    negatives_B = similarity.logsumexp(negatives, queries, bank, tile=tile, exchange=exchange)
    positive_B = jnp.sum(unit(query_BD) * unit(positive_BD), axis=-1) / temperature
    return jnp.mean(jax.nn.softplus(negatives_B - positive_B))


def proto_nce(
    embeddings_BD: jax.Array,
    prototypes_KD: jax.Array,
    concentration_K: jax.Array,
    assignment_B: jax.Array,
    *,
    negative_indices_R: jax.Array | None = None,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """The prototypes' part of ProtoNCE, for one clustering (PCL, Li et al. 2021, eq. 11).

    `−log exp(v·c_s / φ_s) / (exp(v·c_s / φ_s) + Σ_j exp(v·c_j / φ_j))` on cosines, with c_s the
    prototype of v's cluster and j over the others; the mean over embeddings.

    Args:
        embeddings_BD: v; need not be normalised.
        prototypes_KD: c; need not be normalised.
        concentration_K: φ > 0, a temperature for every prototype.
        assignment_B: s, integers from 0 to K − 1.
        negative_indices_R: which prototypes are negatives, integers from 0 to K − 1 (PCL draws
            them); its own is never one of an embedding's, and one that is given twice counts
            twice. None: all.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0; an embedding without negatives adds 0.

    Raises:
        ValueError: shapes that do not fit together, assignments that are no integers.

    >>> f'{proto_nce(jnp.eye(2), jnp.eye(2), jnp.full(2, 0.5), jnp.array([0, 1])):.4f}'
    '0.1269'
    """
    check_labels('proto_nce', embeddings_BD, assignment_B)
    _check_bank('proto_nce', 'prototypes', embeddings_BD, prototypes_KD)
    if concentration_K.shape != prototypes_KD.shape[:1]:
        raise ValueError(
            f'proto_nce: expected concentrations {prototypes_KD.shape[:1]}, one for each of the '
            f'prototypes, got {concentration_K.shape}'
        )
    concentration_K = concentration_K.astype(jnp.float32)
    indices_K = jnp.arange(prototypes_KD.shape[0], dtype=jnp.int32)
    bank = {'prototype': indices_K, 'concentration': concentration_K, **items(prototypes_KD)}
    if negative_indices_R is not None:
        bank = jax.tree.map(lambda x: x[negative_indices_R], bank)
    rows = {'prototype': assignment_B, **items(embeddings_BD)}
    dtype = jnp.promote_types(embeddings_BD.dtype, prototypes_KD.dtype)

    def negatives(row: dict, bank: dict) -> jax.Array:
        own_mn = row['prototype'][:, None] == bank['prototype'][None, :]
        scores_mn = cosine(row, bank, dtype) / bank['concentration'][None, :]
        return jnp.where(own_mn, -jnp.inf, scores_mn)

    negatives_B = similarity.logsumexp(negatives, rows, bank, tile=tile, exchange=exchange)
    # float32 before the rows are picked: what several embeddings add to one prototype is, too.
    positive_B = jnp.sum(unit(embeddings_BD) * unit(prototypes_KD)[assignment_B], axis=-1)
    return jnp.mean(jax.nn.softplus(negatives_B - positive_B / concentration_K[assignment_B]))


def sup_con(
    embeddings_BVD: jax.Array,
    labels_B: jax.Array,
    temperature: float | jax.Array,
    *,
    log: str = 'out',
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """Supervised contrastive loss (SupCon, Khosla et al. 2020, eqs. 2 and 3).

    For an anchor i among all R = B·V views, with P its other views and those of images with its
    label: L_out, `−1/|P| Σ_p log(exp(s_ip / τ) / Σ_{a ≠ i} exp(s_ia / τ))`, or L_in, where the mean
    over P is inside the logarithm. The mean over all anchors that have a positive. (The authors'
    code multiplies by τ / 0.07.)

    Args:
        embeddings_BVD: V views of B images; need not be normalised.
        labels_B: integers, which images are of one class.
        temperature: τ > 0.
        log: 'out' or 'in': where the logarithm is.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar; 0 where no anchor has a positive.

    Raises:
        ValueError: shapes that do not fit together, labels that are no integers, a temperature
            that is not above 0, an unknown `log`.

    >>> views = jnp.eye(2)[:, None].repeat(2, axis=1)  # two equal views of each of two images
    >>> f'{sup_con(views, jnp.array([0, 1]), temperature=1.0):.4f}'
    '0.5514'
    """
    if embeddings_BVD.ndim != 3:
        raise ValueError(f'sup_con: expected embeddings [B, V, D], got {embeddings_BVD.shape}')
    check_labels('sup_con', embeddings_BVD, labels_B)
    check_positive('sup_con', 'temperature', temperature)
    if log not in ('out', 'in'):
        raise ValueError(f"sup_con: log must be 'out' or 'in', got {log!r}")
    B, V, _ = embeddings_BVD.shape
    dtype = embeddings_BVD.dtype
    views = {
        'view': jnp.arange(B * V, dtype=jnp.int32),
        'label': jnp.repeat(labels_B, V, total_repeat_length=B * V),
        **items(rearrange(embeddings_BVD, 'b v d -> (b v) d')),
    }

    def other(row: dict, bank: dict) -> jax.Array:
        return row['view'][:, None] != bank['view'][None, :]

    def positive(row: dict, bank: dict) -> jax.Array:
        return other(row, bank) & (row['label'][:, None] == bank['label'][None, :])

    def score(row: dict, bank: dict) -> jax.Array:
        return cosine(row, bank, dtype) / temperature

    how = {'tile': tile, 'exchange': exchange}
    ids = {key: views[key] for key in ('view', 'label')}
    positives_R = similarity.count(positive, ids, ids, **how).astype(jnp.float32)
    anchors = jnp.maximum(jnp.sum(positives_R > 0), 1)
    all_R = similarity.logsumexp_symmetric(
        lambda row, bank: jnp.where(other(row, bank), score(row, bank), -jnp.inf), views, **how
    )
    all_R = jnp.where(positives_R > 0, all_R, 0.0)
    if log == 'in':
        positive_R = similarity.logsumexp_symmetric(
            lambda row, bank: jnp.where(positive(row, bank), score(row, bank), -jnp.inf),
            views,
            **how,
        )
        positive_R = jnp.where(positives_R > 0, positive_R, 0.0)
        losses_R = all_R - positive_R + jnp.log(jnp.maximum(positives_R, 1))
        return jnp.sum(losses_R) / anchors
    # Every term is divided here, so that the sum is the size of the loss.
    views['share'] = jax.lax.stop_gradient(1 / (anchors * jnp.maximum(positives_R, 1)))
    positive_sum = similarity.sum(
        lambda row, bank: jnp.where(
            positive(row, bank), score(row, bank) * row['share'][:, None], 0.0
        ),
        views,
        views,
        **how,
    )
    return jnp.sum(all_R) / anchors - positive_sum


def _records(loss: str, rows_BD: jax.Array, record_B: jax.Array | None) -> jax.Array:
    if record_B is None:
        return jnp.arange(rows_BD.shape[0], dtype=jnp.int32)
    check_labels(loss, rows_BD, record_B)
    return record_B


def _check_bank(loss: str, name: str, rows_BD: jax.Array, bank_KD: jax.Array) -> None:
    if rows_BD.ndim != 2 or bank_KD.ndim != 2 or bank_KD.shape[1] != rows_BD.shape[1]:
        raise ValueError(
            f'{loss}: {name}_KD must be [K, {rows_BD.shape[-1]}] as the rows [B, D] are, '
            f'got {bank_KD.shape} and {rows_BD.shape}'
        )
