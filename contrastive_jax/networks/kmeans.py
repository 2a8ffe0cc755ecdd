"""k-means of a whole data set's embeddings, and how tight its clusters are.

Lloyd's algorithm on rows that are sharded over the mesh's first axis: the nearest centroid is
found by `similarity.top_k`, so that no [N, k] matrix is stored, and a centroid is the mean of its
rows. Nothing depends on the number of devices but the order in which numbers are added.

N: rows, k: clusters, D: dimensions.
"""

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax import similarity
from contrastive_jax.losses.scores import check_positive, inner, unit


def kmeans(
    x_ND: jax.Array,
    counts_N: jax.Array,
    k: int,
    *,
    key: jax.Array,
    iterations: int = 20,
    spherical: bool = False,
    tile: int = similarity.TILE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clusters rows by Lloyd's algorithm, from k of them that are drawn without replacement.

    A cluster that loses its last row starts again from a row drawn at random. Not differentiable.

    Args:
        x_ND: the rows; of a similar scale around 0, as unit vectors are.
        counts_N: 1 (or True) for a row that counts, 0 for padding, which may hold anything.
        k: clusters, from 1 to N. Where fewer than k rows count, some stay empty.
        key: of the first centroids and of new ones.
        iterations: of assignment and update, at least 1.
        spherical: rows and centroids are scaled to length 1 (Dhillon and Modha 2001), which is
            clustering by cosine.
        tile: as in `similarity.logsumexp`.

    Returns:
        The centroids float32 [k, D], and of every row its nearest centroid, int32 [N], and the
        Euclidean distance (not squared) from it, float32 [N]: −1 and 0 for padding.

    Raises:
        ValueError: shapes that do not fit together, or a number outside its range.

    Source: Lloyd 1982; used by PCL (Li et al. 2021, arXiv:2005.04966, Algorithm 1).
    """
    if x_ND.ndim != 2 or counts_N.shape != x_ND.shape[:1]:
        raise ValueError(
            'kmeans: expected rows [N, D] and one count for each, '
            f'got {x_ND.shape} and {counts_N.shape}'
        )
    if not 1 <= k <= x_ND.shape[0]:
        raise ValueError(f'kmeans: k must be from 1 to the {x_ND.shape[0]} rows, got {k}')
    if iterations < 1:
        raise ValueError(f'kmeans: iterations must be at least 1, got {iterations}')
    counts_N = counts_N.astype(jnp.bool_)
    x_ND = jnp.where(counts_N[:, None], x_ND.astype(jnp.float32), 0.0)  # padding may be NaN
    x_ND = unit(x_ND) if spherical else x_ND

    def nearest(centroids_kD: jax.Array) -> jax.Array:
        """argmin_c |x − c|² = argmax_c 2 x·c − |c|²; the first of equals."""
        bank = {'c': centroids_kD, 'square': jnp.sum(jnp.square(centroids_kD), axis=1)}

        def score(rows_mD: jax.Array, bank: dict) -> jax.Array:
            return 2 * inner(rows_mD, bank['c'], jnp.float32) - bank['square'][None, :]

        return similarity.top_k(score, x_ND, bank, 1, tile=tile)[1][:, 0]

    def update(i: jax.Array, centroids_kD: jax.Array) -> jax.Array:
        cluster_N = nearest(centroids_kD)
        sum_kD = jax.ops.segment_sum(x_ND, cluster_N, k)  # padding adds zeros to its nearest
        size_k = jax.ops.segment_sum(counts_N.astype(jnp.float32), cluster_N, k)
        mean_kD = sum_kD / jnp.maximum(size_k, 1.0)[:, None]
        mean_kD = unit(mean_kD) if spherical else mean_kD
        again_kD = _draw(jax.random.fold_in(again_key, i), x_ND, counts_N, k)
        return jnp.where((size_k > 0)[:, None], mean_kD, again_kD)

    start_key, again_key = jax.random.split(key)
    start_kD = _draw(start_key, x_ND, counts_N, k)
    centroids_kD = lax.fori_loop(0, iterations, update, start_kD)
    cluster_N = nearest(centroids_kD)
    # From the difference: |x|² − 2 x·c + |c|² loses its digits for a row near its centroid.
    distance_N = jnp.linalg.norm(x_ND - centroids_kD[cluster_N], axis=1)
    return centroids_kD, jnp.where(counts_N, cluster_N, -1), jnp.where(counts_N, distance_N, 0.0)


def _draw(key: jax.Array, x_ND: jax.Array, counts_N: jax.Array, k: int) -> jax.Array:
    """k different rows that count, at random; some of them twice if there are fewer than k.

    Those with the highest of N random numbers, each of which depends on the key and on the row's
    number alone, so that it does not matter how the rows are sharded.
    """
    lot_N = jnp.where(counts_N, jax.random.uniform(key, counts_N.shape), -1.0)
    row_k = lax.top_k(lot_N, k)[1]
    return x_ND[row_k[jnp.arange(k) % jnp.maximum(jnp.sum(counts_N), 1)]]


def concentration(
    distance_N: jax.Array,
    assignment_N: jax.Array,
    counts_N: jax.Array,
    k: int,
    *,
    alpha: float = 10.0,
    temperature: float = 0.2,
) -> jax.Array:
    """Each cluster's own temperature, lower where its rows are closer together.

    `φ_c = Σ_{z=1..Z} |v_z − c| / (Z log(Z + α))` over the Z rows of cluster c. One with a single
    row, or none, takes the largest φ of the others; then φ is clipped to its 10th and 90th
    percentile and scaled to a mean of `temperature`.

    Args:
        distance_N: Euclidean distances of rows from their centroids, at least 0.
        assignment_N: the clusters of rows, integers; ignored for padding.
        counts_N: 1 (or True) for a row that counts, 0 for padding.
        k: clusters, at least 1.
        alpha: α > 0, which keeps φ of small clusters from becoming large.
        temperature: the mean of φ, above 0.

    Returns:
        float32 [k], above 0; all of them `temperature` where no distance is above 0.

    Raises:
        ValueError: shapes that differ, or a number outside its range.

    Source: PCL (Li et al. 2021, arXiv:2005.04966), section 3.3, eq. 12; what single rows take and
    the percentiles are the authors' code's.
    """
    if not distance_N.shape == assignment_N.shape == counts_N.shape or distance_N.ndim != 1:
        raise ValueError(
            'concentration: expected three arrays [N], '
            f'got {distance_N.shape}, {assignment_N.shape} and {counts_N.shape}'
        )
    for name, value in (('k', k), ('alpha', alpha), ('temperature', temperature)):
        check_positive('concentration', name, value)
    counts_N = counts_N.astype(jnp.bool_)
    cluster_N = jnp.where(counts_N, assignment_N, 0)
    distance_N = jnp.where(counts_N, distance_N.astype(jnp.float32), 0.0)
    size_k = jax.ops.segment_sum(counts_N.astype(jnp.float32), cluster_N, k)
    sum_k = jax.ops.segment_sum(distance_N, cluster_N, k)
    several_k = size_k > 1
    phi_k = jnp.where(several_k, sum_k / (jnp.maximum(size_k, 1.0) * jnp.log(size_k + alpha)), 0.0)
    phi_k = jnp.where(several_k, phi_k, jnp.max(phi_k))
    low, high = jnp.percentile(phi_k, jnp.asarray([10.0, 90.0]))
    phi_k = jnp.clip(phi_k, low, high)
    mean = jnp.mean(phi_k)
    return jnp.where(mean > 0, temperature * phi_k / jnp.where(mean > 0, mean, 1.0), temperature)
