"""Losses of a student that predicts a teacher, and the targets a teacher sets.

Statistics are those of the global batch: under `jit` plain sums over rows reach all devices.
Arrays come in any floating dtype; everything is computed in float32.

B: images, K: prototypes (outputs of the head), D: embedding dimensions, G: views the teacher sees,
V: views the student sees, R: rows, e.g. masked patches.
"""

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.losses.scores import check_pairs, check_positive, unit


def cosine_distance(prediction_BD: jax.Array, target_BD: jax.Array) -> jax.Array:
    """Squared distance of directions, `2 − 2·cos` (BYOL, Grill et al. 2020, eq. 2).

    (SimSiam's `−cos`, Chen & He 2021, eq. 1, is half of it, minus 1.)

    Args:
        prediction_BD, target_BD: embeddings, row-aligned; need not be normalised. Gradients reach
            both: stopping the target's is the caller's.

    Returns:
        float32 scalar from 0 to 4, the mean over rows.

    Raises:
        ValueError: shapes that differ.

    >>> f'{cosine_distance(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])):.4f}'
    '2.0000'
    """
    check_pairs('cosine_distance', prediction_BD, target_BD)
    # Not 2 − 2·cos, which keeps no digits where the two are close.
    return jnp.mean(jnp.sum((unit(prediction_BD) - unit(target_BD)) ** 2, axis=-1))


def sinkhorn(
    scores_BK: jax.Array,
    *,
    temperature: float | jax.Array,
    iterations: int = 3,
    weights_B: jax.Array | None = None,
) -> jax.Array:
    """Assignments of samples to prototypes that use all prototypes alike (SwAV, Caron et al. 2020,
    section 3.1, eqs. 3 to 5; Sinkhorn-Knopp centring in DINOv2, Oquab et al. 2023, section 4).

    exp(scores / ε) with its columns, then its rows, scaled to equal sums, `iterations` times; then
    every sample's assignments sum to 1. In the log domain, so that nothing over- or underflows at
    any temperature.

    Args:
        scores_BK: of every sample, all over the global batch, with every prototype.
        temperature: ε > 0.
        iterations: at least 1.
        weights_B: 0 for rows to leave out, whatever they hold, 1 for all others; None: all count.

    Returns:
        float32 [B, K] of at least 0; every row sums to 1, or is 0 where it was left out. No
        gradient.

    Raises:
        ValueError: shapes that do not fit together; a temperature or iterations not above 0.

    >>> scores = jnp.array([[3.0, 0.0], [3.0, 0.0]])  # both rows like the first column
    >>> sinkhorn(scores, temperature=1.0).round(4).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if weights_B is None:
        weights_B = jnp.ones(scores_BK.shape[:1])
    if scores_BK.ndim != 2 or weights_B.shape != scores_BK.shape[:1]:
        raise ValueError(
            'sinkhorn: expected scores [B, K] and weights [B], '
            f'got {scores_BK.shape} and {weights_B.shape}'
        )
    check_positive('sinkhorn', 'temperature', temperature)
    check_positive('sinkhorn', 'iterations', iterations)
    scores_BK = lax.stop_gradient(scores_BK).astype(jnp.float32)
    counts_B = weights_B > 0
    log_BK = jnp.where(counts_B[:, None], scores_BK / temperature, 0.0)
    # The matrix is exp(log_BK + row_B + column_K). How much mass a column and a row have in all
    # (1/K and 1/B) is one factor each, which the next scaling takes away again.
    row_B = jnp.where(counts_B, 0.0, -jnp.inf)
    column_K = jnp.zeros(scores_BK.shape[1:])
    for _ in range(iterations):
        column_K = -jax.nn.logsumexp(log_BK + row_B[:, None], axis=0)
        row_B = -jax.nn.logsumexp(log_BK + column_K[None, :], axis=1)
        row_B = jnp.where(counts_B, row_B, -jnp.inf)
    # The last scaling of rows, as a softmax: they sum to 1 however large the logarithms are.
    assignments_BK = jax.nn.softmax(log_BK + column_K[None, :], axis=1)
    return jnp.where(counts_B[:, None], assignments_BK, 0.0)


def swapped(
    targets_BGK: jax.Array, logits_BVK: jax.Array, *, temperature: float | jax.Array
) -> jax.Array:
    """Cross-entropy of every view's prediction with the targets of every other view (SwAV, Caron
    et al. 2020, eq. 2; DINO, Caron et al. 2021, eq. 3 and Algorithm 1; both with multi-crop).

    `−Σ_k t_gk log softmax(logits_v / τ)_k`, the mean over images and over all pairs of a teacher's
    view g and a student's view v ≠ g.

    Args:
        targets_BGK: distributions over prototypes, of the student's first G views.
        logits_BVK: V of at least 2 views, those of the teacher first.
        temperature: τ > 0, the student's.

    Returns:
        float32 scalar, at least 0. Gradients reach both arguments; `sinkhorn` and `teacher` give
        targets that have none.

    Raises:
        ValueError: shapes that do not fit together; a temperature that is not above 0.

    >>> views = jnp.eye(2)[None]  # of one image, two views that disagree
    >>> f'{swapped(views, views, temperature=1.0):.4f}'
    '1.3133'
    """
    same = targets_BGK.ndim == logits_BVK.ndim == 3
    same = same and targets_BGK.shape[::2] == logits_BVK.shape[::2]
    if not same or logits_BVK.shape[1] < max(2, targets_BGK.shape[1]):
        raise ValueError(
            'swapped: expected targets [B, G, K] and logits [B, V, K] of V ≥ G views, at least 2, '
            f'got {targets_BGK.shape} and {logits_BVK.shape}'
        )
    check_positive('swapped', 'temperature', temperature)
    B, G, _ = targets_BGK.shape
    V = logits_BVK.shape[1]
    log_BVK = jax.nn.log_softmax(logits_BVK.astype(jnp.float32) / temperature, axis=-1)
    pairs_BGV = jnp.einsum(
        'bgk,bvk->bgv',
        targets_BGK.astype(jnp.float32),
        log_BVK,
        precision=lax.Precision.HIGHEST,
    )
    other_GV = ~jnp.eye(G, V, dtype=bool)
    return -jnp.sum(jnp.where(other_GV, jnp.sum(pairs_BGV, axis=0), 0.0)) / (B * G * (V - 1))


def centre(
    teacher_logits: jax.Array,
    centre_K: jax.Array,
    momentum: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    """The next running mean of a teacher's outputs (DINO, Caron et al. 2021, eq. 4).

    `m·c + (1 − m)·mean`, the mean over all rows of the global batch.

    Args:
        teacher_logits: [..., K], e.g. [B, G, K] or [R, K].
        centre_K: c.
        momentum: m, from 0 to 1 (DINO: 0.9).
        weights: [...] at least 0, of the rows in the mean; where all are 0 the centre stays. None:
            all count alike.

    Returns:
        float32 [K]; no gradient.

    Raises:
        ValueError: shapes that do not fit together; a momentum out of range.

    >>> centre(jnp.array([[1.0, 3.0], [3.0, 5.0]]), jnp.zeros(2), momentum=0.5).round(4).tolist()
    [1.0, 2.0]
    """
    _check_centre('centre', teacher_logits, centre_K)
    if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
        raise ValueError(f'centre: momentum must be from 0 to 1, got {momentum}')
    logits, centre_K = (x.astype(jnp.float32) for x in (teacher_logits, centre_K))
    rows = tuple(range(logits.ndim - 1))
    if weights is None:
        mean_K = jnp.mean(logits, axis=rows)
    elif weights.shape != logits.shape[:-1]:
        raise ValueError(
            f'centre: expected weights {logits.shape[:-1]}, one a row, got {weights.shape}'
        )
    else:
        total = jnp.sum(weights)
        mean_K = jnp.sum(weights[..., None] * logits, axis=rows) / jnp.where(total > 0, total, 1.0)
        mean_K = jnp.where(total > 0, mean_K, centre_K)
    return lax.stop_gradient(momentum * centre_K + (1 - momentum) * mean_K)


def teacher(logits: jax.Array, centre_K: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """A teacher's centred and sharpened targets, `softmax((logits − c) / τ)` (DINO, Caron et al.
    2021, section 3.1 and Algorithm 1).

    Args:
        logits: [..., K].
        centre_K: c.
        temperature: τ > 0, the teacher's.

    Returns:
        float32 [..., K], which sum to 1; no gradient.

    Raises:
        ValueError: shapes that do not fit together; a temperature that is not above 0.

    >>> teacher(jnp.array([[1.0, 2.0]]), jnp.array([1.0, 2.0]), temperature=0.04).round(4).tolist()
    [[0.5, 0.5]]
    """
    _check_centre('teacher', logits, centre_K)
    check_positive('teacher', 'temperature', temperature)
    centred = logits.astype(jnp.float32) - jnp.expand_dims(
        centre_K.astype(jnp.float32), tuple(range(logits.ndim - 1))
    )
    return lax.stop_gradient(jax.nn.softmax(centred / temperature, axis=-1))


def target_entropies(targets: jax.Array) -> dict[str, jax.Array]:
    """The two entropies, in nats, that say whether a teacher's targets collapse.

    Args:
        targets: distributions over prototypes, [..., K]; the mean is over all rows.

    Returns:
        float32 scalars from 0 to log K without a gradient: 'target_entropy', the mean of the rows'
        entropies, log K where all targets are uniform; 'target_mean_entropy', the entropy of the
        rows' mean, which is no smaller, 0 where all targets are on one and the same prototype.

    Raises:
        ValueError: an array of less than two dimensions.

    Source: DINO (Caron et al. 2021, section 5.3) measures the first, and its gap to the second.

    >>> {k: f'{v:.4f}' for k, v in target_entropies(jnp.eye(2)).items()}
    {'target_entropy': '0.0000', 'target_mean_entropy': '0.6931'}
    """
    if targets.ndim < 2:
        raise ValueError(f'target_entropies: expected targets [..., K], got {targets.shape}')
    targets = lax.stop_gradient(targets).astype(jnp.float32)

    def entropy(p: jax.Array) -> jax.Array:
        return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)

    rows = tuple(range(targets.ndim - 1))
    return {
        'target_entropy': jnp.mean(entropy(targets)),
        'target_mean_entropy': entropy(jnp.mean(targets, axis=rows)),
    }


def masked(
    targets_RK: jax.Array,
    logits_RK: jax.Array,
    weights_R: jax.Array,
    *,
    temperature: float | jax.Array,
) -> jax.Array:
    """Cross-entropy at masked patches (iBOT, Zhou et al. 2022, eq. 2; DINOv2, Oquab et al. 2023,
    section 4).

    `−Σ_r w_r Σ_k t_rk log softmax(logits_r / τ)_k`.

    Args:
        targets_RK: distributions over prototypes, of the patches as the teacher sees them.
        logits_RK: the student's, row-aligned.
        weights_R: at least 0; for the mean over images of the mean over an image's masked patches
            1 / (its number of masked patches · images). Rows of weight 0 add exactly 0 to loss and
            gradient, whatever they hold.
        temperature: τ > 0, the student's.

    Returns:
        float32 scalar, at least 0. Gradients reach targets and logits.

    Raises:
        ValueError: shapes that do not fit together; a temperature that is not above 0.

    >>> weights = jnp.array([1.0, 0.0])
    >>> f'{masked(jnp.eye(2), jnp.zeros((2, 2)), weights, temperature=1.0):.4f}'
    '0.6931'
    """
    check_pairs('masked', targets_RK, logits_RK)
    if weights_R.shape != targets_RK.shape[:1]:
        raise ValueError(
            f'masked: expected weights {targets_RK.shape[:1]}, one a row, got {weights_R.shape}'
        )
    check_positive('masked', 'temperature', temperature)
    counts_R1 = weights_R[:, None] > 0
    targets_RK, logits_RK = (
        jnp.where(counts_R1, x.astype(jnp.float32), 0.0) for x in (targets_RK, logits_RK)
    )
    log_RK = jax.nn.log_softmax(logits_RK / temperature, axis=-1)
    losses_R = -jnp.sum(targets_RK * log_RK, axis=-1)
    return jnp.sum(weights_R.astype(jnp.float32) * losses_R)


def _check_centre(loss: str, logits: jax.Array, centre_K: jax.Array) -> None:
    if logits.ndim < 2 or centre_K.shape != logits.shape[-1:]:
        raise ValueError(
            f'{loss}: expected logits [..., K] of rows and a centre [K], '
            f'got {logits.shape} and {centre_K.shape}'
        )
