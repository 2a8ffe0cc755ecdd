"""Multinomial logistic regression with an L2 penalty, solved to its minimum.

N: rows, D: features, the last of which is constant 1 (its weight is the bias, and not penalised),
C: classes, S: sets of rows, P: problems on one set: other rows or strengths.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax import parallel

MEMORY = 10  # steps that L-BFGS remembers


class Solution(NamedTuple):
    """Of S · P problems: weights, and how well they predict the rows held out.

    Attributes:
        W_SPDC: weights.
        loss_SP: summed cross-entropy of the held-out rows, nats.
        objective_SP: summed cross-entropy of the fitted rows + strength / 2 · ‖W‖².
        iterations: int32, of the problem that needed most.
    """

    W_SPDC: Any
    loss_SP: Any
    objective_SP: Any
    iterations: Any


def to_host(solution: Solution) -> Solution:
    """The same in NumPy arrays, on every process."""
    return Solution(*map(parallel.to_host, solution))


@jax.jit
def solve(
    x_SND: jax.Array,
    label_SN: jax.Array,
    fit_SPN: jax.Array,
    held_SPN: jax.Array,
    strength_SP: jax.Array,
    W_SPDC: jax.Array,
    tolerance_SP: jax.Array,
    max_iterations: jax.Array,
) -> Solution:
    """Solves P problems on each of S sets of rows by L-BFGS, side by side.

    A problem: minimise Σ_i −log softmax(W·x_i)[label_i] + strength/2 · ‖W without bias‖² over the
    rows i that `fit` marks. scikit-learn's LogisticRegression with C = 1 / strength has the same
    minimum.

    Args:
        x_SND: rows; under a mesh they may be sharded on N, and W is then the same everywhere.
        label_SN: int, in [0, C); rows neither fitted nor held out may have any.
        fit_SPN: bool, which rows each problem is fitted to; at least one.
        held_SPN: bool, which rows its cross-entropy is measured on.
        strength_SP: above 0.
        W_SPDC: where to start.
        tolerance_SP: a problem is solved when its next step promises to lower the objective by
            less than this share.
        max_iterations: of the problem that needs most.

    Nocedal and Wright 2006, Numerical Optimization, algorithms 7.4 and 7.5, with backtracking: the
    curvature condition sᵀy > 0 holds anyhow, because the objective is strictly convex along steps.
    The logits of a step's direction are computed once; the line search then needs elementwise work
    only, so that an iteration costs two products with x.
    """
    D, C = W_SPDC.shape[2:]
    rows_SP11 = fit_SPN.sum(-1)[..., None, None]
    share_SNP1 = jnp.swapaxes(fit_SPN / rows_SP11[..., 0], 1, 2)[..., None]
    penalty = (
        strength_SP[..., None, None] / rows_SP11 * (jnp.arange(D) < D - 1)[None, None, :, None]
    )
    true_SN1C = (label_SN[..., None] == jnp.arange(C)[None, None, :])[:, :, None, :]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def logits(W: jax.Array) -> jax.Array:
        return product('snd,spdc->snpc', x_SND, W)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, (2, 3), keepdims=True)

    def cross_entropy(z: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(z, -1) - jnp.where(true_SN1C, z, 0.0).sum(-1)

    def objective(z: jax.Array, W: jax.Array) -> jax.Array:
        loss_SP = (share_SNP1[..., 0] * cross_entropy(z)).sum(1)
        return loss_SP[..., None, None] + dot(penalty * W, W) / 2

    def gradient(z: jax.Array, W: jax.Array) -> jax.Array:
        return product('snd,snpc->spdc', x_SND, share_SNP1 * (jax.nn.softmax(z) - true_SN1C)) + (
            penalty * W
        )

    def search(z: jax.Array, dz: jax.Array, W: jax.Array, d: jax.Array, f, slope, active):
        """(step sizes, objectives, whether they were found): halves steps that lower too little."""

        def halve(carry):
            t, _, found, i = carry
            t = jnp.where(found, t, t / 2)
            lower = objective(z + _per_row(t) * dz, W + t * d)
            # What float32 cannot tell apart is low enough.
            enough = lower <= f + 1e-4 * t * slope + 1e-6 * f
            return t, lower, found | enough, i + 1

        start = jnp.where(active, 2.0, 0.0), f, ~active, 0
        unfinished = lambda carry: jnp.any(~carry[2]) & (carry[3] < 30)  # noqa: E731
        return lax.while_loop(unfinished, halve, start)[:3]

    def iterate(state):
        i, active, W, z, f, last_g, s, memory = state
        g = gradient(z, W)
        memory = _remember(memory, s, g - last_g, dot)
        d = -_times_inverse_hessian(memory, g, dot)
        slope = dot(d, g)
        active &= -slope > tolerance_SP[..., None, None] * f
        dz = logits(d)
        t, lower, found = search(z, dz, W, d, f, slope, active)
        active &= found
        t = jnp.where(active, t, 0.0)
        f = jnp.where(active, lower, f)
        return i + 1, active, W + t * d, z + _per_row(t) * dz, f, g, t * d, memory

    z = logits(W_SPDC)
    f = objective(z, W_SPDC)
    zeros = jnp.zeros_like(W_SPDC)
    history = jnp.zeros((MEMORY, *W_SPDC.shape))
    memory = (history, history, jnp.zeros((MEMORY, *f.shape)))
    state = (jnp.int32(0), jnp.ones_like(f, bool), W_SPDC, z, f, zeros, zeros, memory)
    state = lax.while_loop(lambda s: jnp.any(s[1]) & (s[0] < max_iterations), iterate, state)
    iterations, _, W_SPDC, z, f, *_ = state
    held_SNP = jnp.swapaxes(held_SPN, 1, 2)
    return Solution(
        W_SPDC,
        jnp.sum(jnp.where(held_SNP, cross_entropy(z), 0.0), 1),
        f[..., 0, 0] * rows_SP11[..., 0, 0],
        iterations,
    )


def _per_row(t_SP11: jax.Array) -> jax.Array:
    """[S, P, 1, 1] -> [S, 1, P, 1], to multiply logits [S, N, P, C]."""
    return jnp.swapaxes(t_SP11, 1, 2)


def _remember(memory: tuple, s: jax.Array, y: jax.Array, dot) -> tuple:
    """Adds a step s, the change y of the gradient over it and 1 / sᵀy; forgets the oldest.

    A problem that is solved makes no more steps: its 1 / sᵀy is 0, and such pairs do nothing.
    """
    sy = dot(s, y)
    rho = jnp.where(sy > 0, 1 / jnp.where(sy > 0, sy, 1.0), 0.0)
    return tuple(
        jnp.concatenate([old[1:], new[None]]) for old, new in zip(memory, (s, y, rho), strict=True)
    )


def _times_inverse_hessian(memory: tuple, g: jax.Array, dot) -> jax.Array:
    """The two-loop recursion: memory's estimate of the inverse Hessian, times g."""

    def newest_first(q, pair):
        s, y, rho = pair
        a = rho * dot(s, q)
        return q - a * y, a

    def oldest_first(r, pair):
        s, y, rho, a = pair
        return r + (a - rho * dot(y, r)) * s, None

    q, a = lax.scan(newest_first, g, memory, reverse=True)
    _, y, rho = (m[-1] for m in memory)
    # Before anything is remembered: a step no longer than 1.
    scaled = jnp.where(rho > 0, rho * dot(y, y), jnp.maximum(1.0, jnp.sqrt(dot(g, g))))
    return lax.scan(oldest_first, q / scaled, (*memory, a))[0]
