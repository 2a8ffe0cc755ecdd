"""Losses and measures of how embeddings fill their space: decorrelation, variance, spread.

Statistics are those of the global batch: under `jit` plain sums over rows reach all devices.
Embeddings come in unnormalised, in any floating dtype; everything is computed in float32.

B: images, D: embedding dimensions, V: views, M: directions, T: knots.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from contrastive_jax import similarity
from contrastive_jax.losses.scores import check_pairs, check_positive, inner, unit
from contrastive_jax.similarity import TILE


def barlow_twins(
    view_a_BD: jax.Array,
    view_b_BD: jax.Array,
    *,
    off_diagonal: float = 0.0051,
    eps: float = 1e-5,
) -> jax.Array:
    """Barlow Twins (Zbontar et al. 2021, eqs. 1 and 2).

    `Σ_i (1 − C_ii)² + λ Σ_i Σ_{j ≠ i} C_ij²`, with C = aᵀb / B [D, D] of the two views after each
    dimension was given mean 0 and variance 1 over the batch.

    Args:
        view_a_BD, view_b_BD: embeddings of two views, row-aligned, of B of at least 2.
        off_diagonal: λ, at least 0.
        eps: > 0, added to the (biased) variances before the root, as batch normalisation does.

    Returns:
        float32 scalar, at least 0; about D where nothing is correlated.

    Raises:
        ValueError: shapes that differ, B below 2, an eps that is not above 0.

    >>> view = jnp.array([[1.0, 1.0], [-1.0, -1.0]])  # both dimensions say the same
    >>> f'{barlow_twins(view, view):.4f}'
    '0.0102'
    """
    check_pairs('barlow_twins', view_a_BD, view_b_BD)
    _check_rows('barlow_twins', view_a_BD, 2)
    check_positive('barlow_twins', 'eps', eps)
    a_BD, b_BD = (_standard(x, eps) for x in (view_a_BD, view_b_BD))
    cross_DD = _products(a_BD, b_BD) / a_BD.shape[0]
    own_DD = jnp.eye(a_BD.shape[1], dtype=bool)
    return jnp.sum(jnp.where(own_DD, (1 - cross_DD) ** 2, off_diagonal * cross_DD**2))


def vicreg(
    view_a_BD: jax.Array,
    view_b_BD: jax.Array,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Variance-invariance-covariance regularisation (VICReg, Bardes et al. 2022, eqs. 1 to 6).

    `λ·s + μ·v + ν·c`:
    s, invariance: the mean of (a − b)² over rows and dimensions.
    v, variance: the mean of max(0, 1 − √(Var + ε)) over dimensions and the two views.
    c, covariance: Σ_{i ≠ j} Cov_ij² / D, added over the two views.
    Var and Cov are unbiased (divided by B − 1).

    Paper: s is not divided by D (eq. 5), v is added over the views (eq. 6); here: a mean over
    dimensions and over views, because the authors' code does that, and the published weights are
    those of the code.

    Args:
        view_a_BD, view_b_BD: embeddings of two views, row-aligned, of B of at least 2.
        invariance, variance, covariance: the weights λ, μ, ν, at least 0.
        eps: ε > 0.

    Returns:
        float32 scalar, at least 0, and {'invariance': s, 'variance': v, 'covariance': c}, before
        the weights.

    Raises:
        ValueError: shapes that differ, B below 2, an eps that is not above 0.

    >>> view = jnp.array([[1.0, 1.0], [-1.0, -1.0]])  # both dimensions say the same
    >>> loss, parts = vicreg(view, view)
    >>> f'{loss:.2f}', {name: f'{value:.2f}' for name, value in parts.items()}
    ('8.00', {'invariance': '0.00', 'variance': '0.00', 'covariance': '8.00'})
    """
    check_pairs('vicreg', view_a_BD, view_b_BD)
    _check_rows('vicreg', view_a_BD, 2)
    check_positive('vicreg', 'eps', eps)
    B, D = view_a_BD.shape
    views = [x.astype(jnp.float32) for x in (view_a_BD, view_b_BD)]
    apart = jnp.mean((views[0] - views[1]) ** 2)
    hinge, covaried = jnp.zeros(()), jnp.zeros(())
    for view_BD in views:
        centred_BD = _centred(view_BD)
        std_D = jnp.sqrt(jnp.sum(centred_BD**2, axis=0) / (B - 1) + eps)
        hinge += jnp.mean(jnp.maximum(1 - std_D, 0.0)) / 2
        covariance_DD = _products(centred_BD, centred_BD) / (B - 1)
        own_DD = jnp.eye(D, dtype=bool)
        covaried += jnp.sum(jnp.where(own_DD, 0.0, covariance_DD) ** 2) / D
    loss = invariance * apart + variance * hinge + covariance * covaried
    return loss, {'invariance': apart, 'variance': hinge, 'covariance': covaried}


def koleo(
    x_BD: jax.Array, *, eps: float = 1e-8, tile: int = TILE, exchange: str = 'auto'
) -> jax.Array:
    """Kozachenko-Leonenko entropy regulariser (Sablayrolles et al. 2019; DINOv2, Oquab et
    al. 2023, section 4).

    `−1/B Σ_i log(min_{j ≠ i} ‖u_i − u_j‖ + ε)` with u the rows at length 1: it spreads them out.
    The gradient reaches both ends of every distance to a nearest neighbour.

    Args:
        x_BD: embeddings of one view each of B of at least 2 images; need not be normalised.
        eps: ε > 0. Equal rows have distance 0, and no gradient.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least −log 2, at most −log ε.

    Raises:
        ValueError: what is not [B, D], B below 2, an eps that is not above 0.

    >>> f'{koleo(jnp.eye(2)):.4f}'
    '-0.3466'
    """
    _check_rows('koleo', x_BD, 2)
    check_positive('koleo', 'eps', eps)
    unit_BD = unit(x_BD)
    # A common offset changes no distance, but nearly collapsed rows keep their digits without it.
    z_BD = lax.stop_gradient(_centred(unit_BD))
    index_B = jnp.arange(x_BD.shape[0], dtype=jnp.int32)
    rows = {'index': index_B, 'z': z_BD, 'square': jnp.sum(z_BD**2, axis=1)}

    def nearness(row: dict, bank: dict) -> jax.Array:
        itself_mn = row['index'][:, None] == bank['index'][None, :]
        near_mn = 2 * inner(row['z'], bank['z'], jnp.float32) - bank['square'][None, :]
        return jnp.where(itself_mn, -jnp.inf, near_mn)  # −‖row − bank‖², up to the row's own square

    _, nearest_B1 = similarity.top_k(nearness, rows, rows, 1, tile=tile, exchange=exchange)
    square_B = jnp.sum((unit_BD - unit_BD[nearest_B1[:, 0]]) ** 2, axis=1)
    apart_B = square_B > 0
    distance_B = jnp.where(apart_B, jnp.sqrt(jnp.where(apart_B, square_B, 1.0)), 0.0)
    return -jnp.mean(jnp.log(distance_B + eps))


def sigreg(
    x_BD: jax.Array, directions_MD: jax.Array, *, limit: float = 5.0, knots: int = 17
) -> jax.Array:
    """Sketched isotropic Gaussian regularisation (LeJEPA, Balestriero & LeCun 2025, Algorithm 1).

    How far rows are from N(0, I): the Epps-Pulley statistic of their projections on each of M
    directions, `B ∫ |φ(t) − exp(−t²/2)|² exp(−t²/2) dt` with φ(t) = 1/B Σ_i exp(i t a·x_i), the
    mean over directions. The integral, over [−limit, limit], is by the trapezoidal rule. Its
    integrand is even, so that half of the knots are computed.

    Args:
        x_BD: embeddings of one view of B images, unnormalised.
        directions_MD: at any length above 0; LeJEPA draws new ones from N(0, I) in each step.
        limit: > 0.
        knots: T, odd, at least 3. The authors' package counts those from 0 on: its 17 are 33 here.

    Returns:
        float32 scalar, at least 0. Of rows from N(0, I) its expectation does not depend on B, of
        others it grows with B.

    Raises:
        ValueError: shapes that do not fit together, a limit that is not above 0, knots that are
            even or below 3.

    >>> x = jnp.array([[1.0, 0.0], [-1.0, 0.0]])  # flat
    >>> f'{sigreg(x, jnp.eye(2)[:1]):.4f}', f'{sigreg(x, jnp.eye(2)[1:]):.4f}'
    ('0.2187', '0.8178')
    """
    _check_rows('sigreg', x_BD, 1)
    if directions_MD.ndim != 2 or directions_MD.shape[1] != x_BD.shape[1]:
        raise ValueError(
            f'sigreg: expected directions [M, {x_BD.shape[1]}], got {directions_MD.shape}'
        )
    check_positive('sigreg', 'limit', limit)
    if knots < 3 or knots % 2 == 0:
        raise ValueError(f'sigreg: knots must be odd and at least 3, got {knots}')
    t_T = np.linspace(0, limit, knots // 2 + 1, dtype=np.float32)
    normal_T = np.exp(-(t_T**2) / 2)
    weights_T = 2 * t_T[1] * normal_T  # of the knots at t and −t together
    weights_T[[0, -1]] /= 2  # 0 is one knot, and the last ones are the ends
    projections_BM = jnp.einsum(
        'bd,md->bm', x_BD.astype(jnp.float32), unit(directions_MD), precision=lax.Precision.HIGHEST
    )
    angles_TBM = t_T[:, None, None] * projections_BM[None]
    even_TM, odd_TM = jnp.cos(angles_TBM).mean(1), jnp.sin(angles_TBM).mean(1)
    error_TM = (even_TM - normal_T[:, None]) ** 2 + odd_TM**2
    return x_BD.shape[0] * jnp.mean(jnp.sum(weights_T[:, None] * error_TM, axis=0))


def lejepa(
    z_BVD: jax.Array,
    directions_MD: jax.Array,
    *,
    global_views: int,
    weight: float = 0.05,
    limit: float = 5.0,
    knots: int = 17,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544, Algorithm 2): `(1 − λ)·p + λ·s`.

    p, prediction: the mean over images, views and dimensions of (z − μ)², with μ an image's mean
    over its global views.
    s, sigreg: that of each view, the mean over views.

    Args:
        z_BVD: embeddings of V views, the global ones first.
        directions_MD, limit, knots: see `sigreg`.
        global_views: from 1 to V.
        weight: λ, from 0 to 1.

    Returns:
        float32 scalar, at least 0, and {'prediction': p, 'sigreg': s}, before the weights.
        Gradients reach all views on both sides.

    Raises:
        ValueError: what is not [B, V, D] with so many views; see `sigreg`.

    >>> z = jnp.array([[[1.0], [-1.0]]])  # one image, two views that disagree
    >>> _, parts = lejepa(z, jnp.ones((1, 1)), global_views=2)
    >>> {name: f'{value:.4f}' for name, value in parts.items()}
    {'prediction': '1.0000', 'sigreg': '1.1931'}
    """
    if z_BVD.ndim != 3 or not 1 <= global_views <= z_BVD.shape[1]:
        raise ValueError(
            f'lejepa: expected embeddings [B, V, D] with {global_views} global views of V, got '
            f'{z_BVD.shape}'
        )
    z_BVD = z_BVD.astype(jnp.float32)
    centre_B1D = z_BVD[:, :global_views].mean(axis=1, keepdims=True)
    prediction = jnp.mean((z_BVD - centre_B1D) ** 2)
    # One view after another: all of their angles at once would be V times as large.
    terms = [
        sigreg(z_BVD[:, v], directions_MD, limit=limit, knots=knots) for v in range(z_BVD.shape[1])
    ]
    gaussian = jnp.mean(jnp.stack(terms))
    loss = (1 - weight) * prediction + weight * gaussian
    return loss, {'prediction': prediction, 'sigreg': gaussian}


def output_std(x_BD: jax.Array) -> jax.Array:
    """Whether embeddings collapse: their spread on the unit sphere (SimSiam, Chen & He 2021,
    section 4.1, figure 2, middle).

    The standard deviation over the batch of every dimension of the rows at length 1, the mean over
    dimensions, times √D. To be logged; no gradient.

    Args:
        x_BD: embeddings; need not be normalised.

    Returns:
        float32 scalar from 0, where all point the same way, to 1, where directions are spread
        evenly.

    Raises:
        ValueError: what is not [B, D].

    >>> f'{output_std(jnp.eye(2)):.4f}', f'{output_std(jnp.ones((2, 2))):.4f}'
    ('0.7071', '0.0000')
    """
    _check_rows('output_std', x_BD, 1)
    unit_BD = lax.stop_gradient(unit(x_BD))
    std_D = jnp.sqrt(jnp.mean(_centred(unit_BD) ** 2, axis=0))
    return jnp.mean(std_D) * x_BD.shape[1] ** 0.5


def _centred(x_BD: jax.Array) -> jax.Array:
    return x_BD - jnp.mean(x_BD, axis=0, keepdims=True)


def _standard(x_BD: jax.Array, eps: float) -> jax.Array:
    """float32, of mean 0 and variance 1 in every dimension."""
    centred_BD = _centred(x_BD.astype(jnp.float32))
    return centred_BD * lax.rsqrt(jnp.mean(centred_BD**2, axis=0, keepdims=True) + eps)


def _products(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
    """aᵀb [D, D] in full float32: centred values have more digits than bfloat16, whatever came."""
    return jnp.einsum('bd,be->de', a_BD, b_BD, precision=lax.Precision.HIGHEST)


def _check_rows(loss: str, x_BD: jax.Array, least: int) -> None:
    if x_BD.ndim != 2 or x_BD.shape[0] < least:
        raise ValueError(f'{loss}: expected [B, D] with B at least {least}, got {x_BD.shape}')
