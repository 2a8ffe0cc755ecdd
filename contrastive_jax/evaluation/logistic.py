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

FORCING = 0.05  # conjugate gradients go on while they gain more than this share of the mean gain
LEVEL = 0.5  # a step is long enough when the slope at its end is at most this share of the first
HALVINGS = 30  # tries to find such a length
LEAST = 1e-12  # weight of a class: of one without rows it falls until nothing is left


class Solution(NamedTuple):
    """Weights of S · P problems, and how well they predict the rows held out.

    Attributes:
        W_SPDC: weights.
        loss_SP: summed cross-entropy of the held-out rows, nats.
        objective_SP: summed cross-entropy of the fitted rows + strength / 2 · ‖W‖².
        iterations: int32, gradients and products with the Hessian of the problem that needed most;
            each costs two products with the features.
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
    """Solves P problems on each of S sets of rows by truncated Newton steps, side by side.

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
        tolerance_SP: a problem is solved by the step that promises to lower its objective by less
            than this share. That step is still made; what remains is a small part of it.
        max_iterations: of the problem that needs most.

    A step is Newton's, truncated: conjugate gradients solve H·d = −gradient as long as they gain
    enough (Nash and Sofer 1990, Assessing a search direction within a truncated-Newton method), and
    the objective is minimised along d. What a step promises is the gain in the quadratic model, and
    this tells how far away the minimum is. (What L-BFGS's next step promises does not: while its
    memory is empty, as after a warm start, that is next to nothing wherever the minimum is.)

    float32 is enough for 1e-9 of the objective, because values of the objective, which rounding
    makes equal long before the gradient is 0, are not compared: the objective is convex, so that
    slopes tell where it is lowest along a line. Logits are relative to the true class's, so that
    1 − p is not the difference of two numbers that are nearly equal.
    """
    D, C = W_SPDC.shape[2:]
    rows_SP11 = fit_SPN.sum(-1)[..., None, None]
    share_SNP1 = jnp.swapaxes(fit_SPN / rows_SP11[..., 0], 1, 2)[..., None]
    penalty = (
        strength_SP[..., None, None] / rows_SP11 * (jnp.arange(D) < D - 1)[None, None, :, None]
    )
    square_S1D1 = jnp.mean(x_SND**2, 1)[:, None, :, None]
    true_SN1C = (label_SN[..., None] == jnp.arange(C)[None, None, :])[:, :, None, :]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def logits(W: jax.Array) -> jax.Array:
        z = product('snd,spdc->snpc', x_SND, W)
        return z - jnp.where(true_SN1C, z, 0.0).sum(-1, keepdims=True)

    def transposed(r: jax.Array, weight_SP1C: jax.Array) -> jax.Array:
        """The mean over rows of x ⊗ r, whose sum over classes is 0, as each row's is."""
        W = product('snd,snpc->spdc', x_SND, share_SNP1 * r)
        # What rounding leaves of that sum would grow without bounds in the bias, which has no
        # curvature along it. Classes bear it by weight: the smallest are the most sensitive.
        return W - W.sum(-1, keepdims=True) * weight_SP1C / weight_SP1C.sum(-1, keepdims=True)

    def over_rows(y: jax.Array) -> jax.Array:
        """Means of the fitted rows' numbers y [S, N, P]: [S, P, 1, 1]."""
        return (share_SNP1[..., 0] * y).sum(1)[..., None, None]

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, (2, 3), keepdims=True)

    def newton(state):
        """One step: its direction by conjugate gradients, its length by the slope along it."""
        i, active, W, z = state
        r = _residual(z, true_SN1C)
        weight_SPC = (share_SNP1 * jnp.abs(r) * (1 - jnp.abs(r))).sum(1)
        weight_SP1C = jnp.maximum(weight_SPC, LEAST)[:, :, None, :]
        g = transposed(r, weight_SP1C) + penalty * W
        f = over_rows(_cross_entropy(z, true_SN1C)) + dot(penalty * W, W) / 2
        # The Hessian's diagonal, if what rows weigh had nothing to do with their features.
        h = square_S1D1 * weight_SP1C + penalty

        def descend(carry):
            i, running, n, promise, d, rest, s, rho = carry
            Hs = transposed(_times_hessian(r + true_SN1C, logits(s)), weight_SP1C) + penalty * s
            curvature = dot(s, Hs)
            running &= curvature > 0
            a = jnp.where(running, rho / jnp.where(running, curvature, 1.0), 0.0)
            d, rest = d + a * s, rest - a * Hs
            gain = a * rho / 2
            n, promise = n + 1, promise + gain
            running &= n * gain > FORCING * promise
            last, rho = rho, dot(rest, rest / h)
            s = rest / h + jnp.where(running, rho / jnp.where(running, last, 1.0), 0.0) * s
            return i + 1, running, n, promise, d, rest, s, rho

        nothing = jnp.zeros_like(f)
        start = i + 1, active, 0, nothing, jnp.zeros_like(W), -g, -g / h, dot(g, g / h)
        descending = lambda carry: jnp.any(carry[1]) & (carry[0] < max_iterations)  # noqa: E731
        i, _, _, promise, d, *_ = lax.while_loop(descending, descend, start)
        dz = logits(d)

        def narrow(carry):
            """A step of Newton's method towards slope 0, inside an interval that holds it."""
            n, found, low, high, t = carry
            r = _residual(z + _per_row(t) * dz, true_SN1C)
            slope = over_rows((r * dz).sum(-1)) + dot(penalty * d, W + t * d)
            curved = (_times_hessian(r + true_SN1C, dz) * dz).sum(-1)
            curvature = over_rows(curved) + dot(penalty * d, d)
            found |= jnp.abs(slope) <= LEVEL * jnp.abs(dot(g, d))
            low, high = jnp.where(slope < 0, t, low), jnp.where(slope < 0, high, t)
            better = t - slope / curvature
            inside = (better > low) & (better < jnp.minimum(high, 10 * t))
            middle = jnp.where(jnp.isinf(high), 2 * t, (low + high) / 2)
            return n + 1, found, low, high, jnp.where(found, t, jnp.where(inside, better, middle))

        start = 0, ~active, nothing, nothing + jnp.inf, nothing + 1
        narrowing = lambda carry: jnp.any(~carry[1]) & (carry[0] < HALVINGS)  # noqa: E731
        _, found, _, _, t = lax.while_loop(narrowing, narrow, start)
        t = jnp.where(active & found, t, 0.0)
        active &= found & (promise > tolerance_SP[..., None, None] * f)
        return i, active, W + t * d, z + _per_row(t) * dz

    state = (jnp.int32(0), jnp.ones_like(rows_SP11, bool), W_SPDC, logits(W_SPDC))
    unsolved = lambda state: jnp.any(state[1]) & (state[0] < max_iterations)  # noqa: E731
    iterations, _, W_SPDC, z = lax.while_loop(unsolved, newton, state)
    cross_entropy_SNP = _cross_entropy(z, true_SN1C)
    loss_SP11 = over_rows(cross_entropy_SNP) + dot(penalty * W_SPDC, W_SPDC) / 2
    held_SNP = jnp.swapaxes(held_SPN, 1, 2)
    return Solution(
        W_SPDC,
        jnp.sum(jnp.where(held_SNP, cross_entropy_SNP, 0.0), 1),
        (loss_SP11 * rows_SP11)[..., 0, 0],
        iterations,
    )


def _per_row(t_SP11: jax.Array) -> jax.Array:
    """[S, P, 1, 1] -> [S, 1, P, 1], to multiply logits [S, N, P, C]."""
    return jnp.swapaxes(t_SP11, 1, 2)


def _parts(z: jax.Array, true: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The maximum of logits, the true class's being 0; exp of the others' and of the true class's,
    both divided by exp of the maximum."""
    top = z.max(-1, keepdims=True, initial=0.0)
    return top, jnp.where(true, 0.0, jnp.exp(z - top)), jnp.exp(-top)


def _cross_entropy(z: jax.Array, true: jax.Array) -> jax.Array:
    """Cross-entropy [...] of logits [..., C], the true class's being 0."""
    top, others, own = _parts(z, true)
    others = others.sum(-1)
    top, own = top[..., 0], own[..., 0]
    return jnp.where(top > 0, top + jnp.log(others + own), jnp.log1p(others))


def _residual(z: jax.Array, true: jax.Array) -> jax.Array:
    """The gradient of the cross-entropy: probabilities, less 1 for the true class."""
    _, others, own = _parts(z, true)
    total = others.sum(-1, keepdims=True)
    return jnp.where(true, -total, others) / (total + own)


def _times_hessian(p: jax.Array, dz: jax.Array) -> jax.Array:
    """The Hessian of the cross-entropy by logits, at probabilities p, times dz."""
    return p * (dz - (p * dz).sum(-1, keepdims=True))
