"""Losses of metric learning: max-margin, triplet and N-pair.

B: embeddings, D: embedding dimensions, K: dimensions after a linear map, P: positives.
"""

import jax
import jax.numpy as jnp

from contrastive_jax import similarity
from contrastive_jax.losses.scores import check_labels, check_pairs, check_positive, inner, unit
from contrastive_jax.similarity import TILE
from contrastive_jax.similarity.tiles import strips

DISTANCES = ('euclidean', 'squared_euclidean', 'cosine', 'mahalanobis')


def max_margin(
    embeddings_BD: jax.Array,
    labels_B: jax.Array,
    *,
    margin: float = 1.0,
    distance: str = 'euclidean',
    map_KD: jax.Array | None = None,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """Max-margin ("contrastive") loss of all pairs (Hadsell et al. 2006, eq. 4).

    `½ d²` for a pair of one label, `½ max(0, margin − d)²` for one of two; the mean over all pairs
    of different embeddings.

    Args:
        embeddings_BD: B of at least 2; taken as they are, except by 'cosine'.
        labels_B: integers.
        margin: > 0, in units of d.
        distance: d: 'euclidean', 'squared_euclidean', 'cosine' (1 − cosine, from 0 to 2) or
            'mahalanobis', ‖L(x − y)‖ with L = map_KD, so √((x−y)ᵀ M (x−y)) with M = LᵀL.
        map_KD: L, for 'mahalanobis' alone; gets gradients.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0.

    Raises:
        ValueError: shapes that do not fit together, labels that are no integers, a margin that is
            not above 0, an unknown distance, a map without 'mahalanobis' or the reverse.

    >>> points, labels = jnp.array([[0.0], [0.5], [1.0]]), jnp.array([0, 0, 1])
    >>> f'{max_margin(points, labels):.4f}'
    '0.0833'
    """
    _check('max_margin', embeddings_BD, labels_B, margin)
    B = embeddings_BD.shape[0]
    between, points = _distance('max_margin', distance, embeddings_BD, map_KD)
    points = {'label': labels_B, 'index': jnp.arange(B, dtype=jnp.int32), **points}

    def term(row: dict, bank: dict) -> jax.Array:
        d_mn = between(row, bank)
        same_mn = row['label'][:, None] == bank['label'][None, :]
        loss_mn = jnp.where(same_mn, d_mn**2, jnp.maximum(margin - d_mn, 0.0) ** 2) / 2
        itself_mn = row['index'][:, None] == bank['index'][None, :]
        return jnp.where(itself_mn, 0.0, loss_mn) / float(B * (B - 1))

    return similarity.sum(term, points, points, tile=tile, exchange=exchange)


def triplet(
    embeddings_BD: jax.Array,
    labels_B: jax.Array,
    *,
    margin: float = 0.2,
    mining: str = 'all',
    distance: str = 'euclidean',
    map_KD: jax.Array | None = None,
) -> jax.Array:
    """Triplet loss, `max(0, d(a, p) − d(a, n) + margin)`, p of a's label and n of another.

    Args:
        embeddings_BD: taken as they are, except by 'cosine'. (FaceNet: of length 1, with the
            squared Euclidean distance.)
        labels_B: integers.
        margin: > 0, in units of d.
        mining: which triplets are averaged over.
            'all': every one (Hermans et al. 2017, "batch all", eq. 6).
            'semi_hard': for every (a, p) the nearest negative that is farther than p (FaceNet,
            Schroff et al. 2015, section 3.2), or where there is none the farthest negative (as in
            TensorFlow Addons' TripletSemiHardLoss).
            'batch_hard': for every a the farthest positive and the nearest negative (Hermans et
            al. 2017, eq. 5).
        distance, map_KD: as in `max_margin`.

    Returns:
        float32 scalar, at least 0; 0 where there is no triplet.

    Raises:
        ValueError: as `max_margin`; an unknown mining.

    All distances of some rows are held at a time (`tiles.strips`), sorted, so 'all' costs
    B² log B rather than B³.

    >>> points, labels = jnp.array([[0.0], [0.5], [1.0]]), jnp.array([0, 0, 1])
    >>> f'{triplet(points, labels, margin=1.0):.4f}'
    '0.7500'
    """
    _check('triplet', embeddings_BD, labels_B, margin)
    losses = {'all': _all, 'semi_hard': _semi_hard, 'batch_hard': _batch_hard}
    if mining not in losses:
        raise ValueError(f'triplet: mining must be one of {tuple(losses)}, got {mining!r}')
    between, points = _distance('triplet', distance, embeddings_BD, map_KD)
    B = embeddings_BD.shape[0]
    points = {'label': labels_B, 'index': jnp.arange(B, dtype=jnp.int32), **points}

    def of_rows(row: dict, bank: dict) -> tuple[jax.Array, jax.Array]:
        """Every anchor's loss, summed over its triplets, and how many those are."""
        same_mB = row['label'][:, None] == bank['label'][None, :]
        itself_mB = row['index'][:, None] == bank['index'][None, :]
        return losses[mining](between(row, bank), same_mB & ~itself_mB, ~same_mB, margin)

    loss_B, count_B = strips(of_rows, points, points)
    return jnp.sum(loss_B) / jnp.maximum(jnp.sum(count_B), 1)


def n_pair(
    anchor_BD: jax.Array,
    positive_BD: jax.Array,
    labels_B: jax.Array | None = None,
    *,
    l2: float = 0.0,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """Multi-class N-pair loss (Sohn 2016, eq. 7, with the penalty of section 3.2.2).

    `1/B Σ_i log(1 + Σ_{j ≠ i} exp(a_i·p_j − a_i·p_i))` on inner products, not cosines, plus
    `l2 · 1/B Σ_i (‖a_i‖² + ‖p_i‖²)`, which keeps the lengths from growing.

    Args:
        anchor_BD, positive_BD: embeddings, row-aligned.
        labels_B: integers; pairs of one label are no negatives of each other. None: each pair is
            of another class, as the paper draws its batches.
        l2: weight of the squared lengths, at least 0.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0.

    Raises:
        ValueError: shapes that differ; labels that are no integers.

    >>> f'{n_pair(2 * jnp.eye(2), 2 * jnp.eye(2)):.4f}'
    '0.0181'
    """
    check_pairs('n_pair', anchor_BD, positive_BD)
    pair_B = jnp.arange(anchor_BD.shape[0], dtype=jnp.int32)
    if labels_B is not None:
        check_labels('n_pair', anchor_BD, labels_B)
        pair_B = jnp.asarray(labels_B)
    anchors, positives = ({'pair': pair_B, 'z': x_BD} for x_BD in (anchor_BD, positive_BD))
    dtype = jnp.promote_types(anchor_BD.dtype, positive_BD.dtype)

    def negatives(anchor: dict, positive: dict) -> jax.Array:
        paired_mn = anchor['pair'][:, None] == positive['pair'][None, :]
        return jnp.where(paired_mn, -jnp.inf, inner(anchor['z'], positive['z'], dtype))

    negatives_B = similarity.logsumexp(negatives, anchors, positives, tile=tile, exchange=exchange)
    a_BD, p_BD = anchor_BD.astype(jnp.float32), positive_BD.astype(jnp.float32)
    loss = jnp.mean(jax.nn.softplus(negatives_B - jnp.sum(a_BD * p_BD, axis=-1)))
    if l2:
        loss += l2 * jnp.mean(jnp.sum(a_BD**2 + p_BD**2, axis=-1))
    return loss


def _all(d_mB: jax.Array, positive_mB: jax.Array, negative_mB: jax.Array, margin: float):
    # Of the negatives in ascending order, the first `found` are nearer than d_ap + margin; their
    # share of the hinge is found · (d_ap + margin) − Σ d_an.
    d_an = jnp.sort(jnp.where(negative_mB, d_mB, jnp.inf), axis=1)
    limit_mB = d_mB + margin
    found_mB = _search(d_an, limit_mB)
    up_to = jnp.cumsum(jnp.where(jnp.isinf(d_an), 0.0, d_an), axis=1)
    up_to = jnp.pad(up_to, ((0, 0), (1, 0)))
    hinge_mB = found_mB * limit_mB - jnp.take_along_axis(up_to, found_mB, axis=1)
    hinge_mB = jnp.maximum(hinge_mB, 0.0)  # where it is rounding alone
    loss_m = jnp.sum(jnp.where(positive_mB, hinge_mB, 0.0), axis=1)
    return loss_m, jnp.sum(positive_mB, 1).astype(jnp.float32) * jnp.sum(negative_mB, 1)


def _semi_hard(d_mB: jax.Array, positive_mB: jax.Array, negative_mB: jax.Array, margin: float):
    negatives_m = jnp.sum(negative_mB, axis=1)
    d_an = jnp.sort(jnp.where(negative_mB, d_mB, jnp.inf), axis=1)
    # The first negative beyond d_ap; where all are nearer, the last one.
    found_mB = jnp.minimum(_search(d_an, d_mB), jnp.maximum(negatives_m - 1, 0)[:, None])
    counts_mB = positive_mB & (negatives_m > 0)[:, None]
    chosen_mB = jnp.where(counts_mB, jnp.take_along_axis(d_an, found_mB, axis=1), 0.0)
    hinge_mB = jnp.maximum(d_mB - chosen_mB + margin, 0.0)
    loss_m = jnp.sum(jnp.where(counts_mB, hinge_mB, 0.0), axis=1)
    return loss_m, jnp.sum(counts_mB, axis=1).astype(jnp.float32)


def _batch_hard(d_mB: jax.Array, positive_mB: jax.Array, negative_mB: jax.Array, margin: float):
    counts_m = positive_mB.any(1) & negative_mB.any(1)
    d_ap = jnp.max(jnp.where(positive_mB, d_mB, -jnp.inf), axis=1)
    d_an = jnp.min(jnp.where(negative_mB, d_mB, jnp.inf), axis=1)
    d_ap, d_an = (jnp.where(counts_m, d, 0.0) for d in (d_ap, d_an))
    hinge_m = jnp.maximum(d_ap - d_an + margin, 0.0)
    return jnp.where(counts_m, hinge_m, 0.0), counts_m


def _search(sorted_mB: jax.Array, at_mB: jax.Array) -> jax.Array:
    """For each of `at`'s values, the number of the row's sorted values that are at most it."""
    search = jax.vmap(lambda values, at: jnp.searchsorted(values, at, side='right'))
    return search(*jax.lax.stop_gradient((sorted_mB, at_mB)))


def _distance(loss: str, name: str, x_BD: jax.Array, map_KD: jax.Array | None):
    """(`(rows_block, bank_block) -> d_mn`, what it needs of each embedding)."""
    if name not in DISTANCES:
        raise ValueError(f'{loss}: distance must be one of {DISTANCES}, got {name!r}')
    if (name == 'mahalanobis') != (map_KD is not None):
        raise ValueError(f"{loss}: map_KD belongs to distance='mahalanobis', got {name!r}")
    x_BD = x_BD.astype(jnp.float32)
    if name == 'cosine':
        return lambda a, b: 1 - inner(a['z'], b['z'], jnp.float32), {'z': unit(x_BD)}
    if map_KD is not None:
        if map_KD.ndim != 2 or map_KD.shape[1] != x_BD.shape[1]:
            raise ValueError(f'{loss}: map_KD must be [K, {x_BD.shape[1]}], got {map_KD.shape}')
        x_BD = inner(x_BD, map_KD, jnp.float32)
    # A common offset changes no distance, but costs digits in ‖a‖² + ‖b‖² − 2a·b.
    x_BD = x_BD - jax.lax.stop_gradient(x_BD.mean(0, keepdims=True))

    def squared(a: dict, b: dict) -> jax.Array:
        square_mn = a['square'][:, None] + b['square'][None, :]
        return jnp.maximum(square_mn - 2 * inner(a['z'], b['z'], jnp.float32), 0.0)

    def euclidean(a: dict, b: dict) -> jax.Array:
        square_mn = squared(a, b)
        apart_mn = square_mn > 0  # two of the same place: distance 0, gradient 0
        return jnp.where(apart_mn, jnp.sqrt(jnp.where(apart_mn, square_mn, 1.0)), 0.0)

    points = {'z': x_BD, 'square': jnp.sum(x_BD**2, axis=1)}
    return squared if name == 'squared_euclidean' else euclidean, points


def _check(loss: str, embeddings_BD: jax.Array, labels_B: jax.Array, margin: float) -> None:
    if embeddings_BD.ndim != 2 or embeddings_BD.shape[0] < 2:
        raise ValueError(
            f'{loss}: expected at least two embeddings [B, D], got {embeddings_BD.shape}'
        )
    check_labels(loss, embeddings_BD, labels_B)
    check_positive(loss, 'margin', margin)
