"""Losses against their papers' formulas in float64 NumPy loops: values and gradients.

Dimension key: B pairs, K negatives, D embedding, R = 2B views.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_jax import losses, parallel

TOLERANCE = 2e-6  # relative, float32 against float64
FLOOR = 1e-3  # a loss or gradient below this is compared absolutely, at TOLERANCE × FLOOR


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def through_unit(x, du):
    """Gradient of x from that of unit(x)."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    u = x / length
    return (du - (du * u).sum(-1, keepdims=True) * u) / length


def nt_xent_oracle(a_BD, b_BD, temperature):
    """SimCLR's equation 1 and its gradient, one view at a time."""
    a_BD, b_BD, temperature = (np.asarray(x, np.float64) for x in (a_BD, b_BD, temperature))
    B = len(a_BD)
    z = np.concatenate([a_BD, b_BD])  # the paper's order does not matter: 2B views, partner ±B
    u = unit(z)
    loss, du, dt = 0.0, np.zeros_like(u), 0.0
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        cosines = u @ u[i]
        others = [k for k in range(2 * B) if k != i]
        scores = cosines[others] / temperature
        top = scores.max()
        weights = np.exp(scores - top)
        loss += top + np.log(weights.sum()) - cosines[partner] / temperature
        p = weights / weights.sum()
        d_scores = np.zeros(2 * B)
        d_scores[others] = p
        d_scores[partner] -= 1
        dt -= (d_scores * cosines).sum() / temperature**2
        du[i] += (d_scores[:, None] * u).sum(0) / temperature
        du += d_scores[:, None] * u[i] / temperature
    dz = through_unit(z, du / (2 * B))
    return loss / (2 * B), (dz[:B], dz[B:], dt / (2 * B))


def info_nce_oracle(q_BD, p_BD, n_KD, temperature):
    """MoCo's equation 1 and its gradient, one query at a time."""
    q_BD, p_BD, n_KD, temperature = (
        np.asarray(x, np.float64) for x in (q_BD, p_BD, n_KD, temperature)
    )
    q, p, n = unit(q_BD), unit(p_BD), unit(n_KD)
    B = len(q)
    loss, dq, dp, dn, dt = 0.0, np.zeros_like(q), np.zeros_like(p), np.zeros_like(n), 0.0
    for i in range(B):
        cosines = np.concatenate([[q[i] @ p[i]], n @ q[i]])
        scores = cosines / temperature
        top = scores.max()
        weights = np.exp(scores - top)
        loss += top + np.log(weights.sum()) - scores[0]
        d = weights / weights.sum()
        d[0] -= 1
        dt -= (d * cosines).sum() / temperature**2
        dq[i] = (d[0] * p[i] + d[1:] @ n) / temperature
        dp[i] = d[0] * q[i] / temperature
        dn += d[1:, None] * q[i] / temperature
    gradients = (through_unit(q_BD, dq / B), through_unit(p_BD, dp / B), through_unit(n_KD, dn / B))
    return loss / B, (*gradients, dt / B)


def relative(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), FLOOR)


def pairs(rng, B, D):
    """Two views, from nearly equal to unrelated, of lengths that differ by orders of magnitude."""
    a = rng.normal(size=(B, D))
    b = a + rng.normal(size=(B, D)) * rng.choice([0.1, 1.0, 10.0])
    return [(x * np.exp(rng.normal(size=(B, 1)))).astype(np.float32) for x in (a, b)]


# Shapes that divide by nothing, that are smaller than the mesh, and that fill several tiles.
NT_XENT_SHAPES = [(1, 8), (3, 2), (16, 33), (37, 64), (64, 16)]
INFO_NCE_SHAPES = [(1, 5, 8), (6, 1, 3), (16, 64, 32), (11, 50, 17)]
# Every count of devices and every tile once; the slow tests take all pairs.
FEW = [(1, 3), (2, 16), (4, 1024), (8, 16)]
ALL = [(devices, tile) for devices in (1, 2, 4, 8) for tile in (3, 16, 1024)]


@pytest.mark.parametrize('shape', NT_XENT_SHAPES)
def test_nt_xent_equals_the_paper(shape):
    """200 cases in all, 40 a shape."""
    check_nt_xent(shape, FEW)


@pytest.mark.parametrize('shape', INFO_NCE_SHAPES)
def test_info_nce_equals_the_paper(shape):
    """60 cases in all, 15 a shape."""
    check_info_nce(shape, FEW)


@pytest.mark.slow
def test_losses_equal_the_papers_on_all_devices_and_tiles():
    for shape in NT_XENT_SHAPES:
        check_nt_xent(shape, ALL)
    for shape in INFO_NCE_SHAPES:
        check_info_nce(shape, ALL)


def check_nt_xent(shape, grid):
    rng = np.random.default_rng(shape[0])
    cases = []
    for _ in range(40):
        a, b = pairs(rng, *shape)
        temperature = np.float32(np.exp(rng.uniform(np.log(0.05), 0)))
        cases.append(((a, b, temperature), nt_xent_oracle(a, b, temperature)))
    worst = _worst(
        lambda tile: lambda a, b, t: losses.nt_xent(a, b, temperature=t, tile=tile), cases, grid
    )
    assert worst <= TOLERANCE


def check_info_nce(shape, grid):
    rng = np.random.default_rng(shape[1])
    B, K, D = shape
    cases = []
    for _ in range(15):
        q, p = pairs(rng, B, D)
        n = rng.normal(size=(K, D)).astype(np.float32)
        temperature = np.float32(np.exp(rng.uniform(np.log(0.05), 0)))
        cases.append(((q, p, n, temperature), info_nce_oracle(q, p, n, temperature)))
    worst = _worst(
        lambda tile: lambda q, p, n, t: losses.info_nce(q, p, n, temperature=t, tile=tile),
        cases,
        grid,
    )
    assert worst <= TOLERANCE


def _worst(loss_of_tile, cases, grid):
    """The largest relative error of value and embeddings' gradients over devices and tiles.

    The temperature's gradient cancels between positives and negatives, so it is held to the size
    of its two terms instead.
    """
    worst = 0.0
    arguments = tuple(range(len(cases[0][0])))
    for devices, tile in grid:
        with jax.set_mesh(parallel.make_mesh(jax.devices()[:devices])):
            compiled = jax.jit(jax.value_and_grad(loss_of_tile(tile), arguments))
            for inputs, (value, gradients) in cases:
                got, (*got_d, got_dt) = jax.device_get(compiled(*inputs))
                *d, dt = gradients
                flat = [np.concatenate([x.ravel() for x in xs]) for xs in (got_d, d)]
                worst = max(worst, relative(got, value), relative(*flat))
                assert abs(got_dt - dt) <= TOLERANCE / inputs[-1] ** 2
    return worst


FINITE = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(FINITE, min_size=24, max_size=24),
    temperature=st.sampled_from([0.05, 0.1, 0.5, 2.0]),
)
def test_nt_xent_of_hostile_values(values, temperature):
    """Equal rows, zero rows, opposite rows, lengths from 1e-38 to 1e4: always finite and right."""
    a, b = np.asarray(values, np.float32).reshape(2, 4, 3)
    value, gradients = NT_XENT(a, b, np.float32(temperature))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
    lengths = np.linalg.norm(np.concatenate([a, b]).astype(np.float64), axis=1)
    if lengths.min() > 1e-14:  # much shorter rows count as zero
        expected, _ = nt_xent_oracle(a, b, temperature)
        assert abs(value - expected) <= 1e-5 * max(expected, 1)


NT_XENT = jax.jit(
    jax.value_and_grad(lambda a, b, t: losses.nt_xent(a, b, temperature=t), (0, 1, 2))
)


def test_bfloat16_embeddings_lose_only_their_own_rounding():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in pairs(rng, 32, 64))
    got, gradient = jax.value_and_grad(lambda a: losses.nt_xent(a, b, temperature=0.1))(a)
    value, (da, _, _) = nt_xent_oracle(
        np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), 0.1
    )
    assert relative(got, value) <= TOLERANCE
    assert gradient.dtype == jnp.bfloat16
    assert relative(gradient.astype(jnp.float32), da) <= 2**-8


def test_a_view_pair_alone_has_no_negatives():
    a = jnp.ones((1, 4))
    value, gradient = jax.value_and_grad(lambda a: losses.nt_xent(a, a, temperature=0.1))(a)
    assert value == 0.0
    assert np.array_equal(gradient, np.zeros((1, 4)))


def test_zero_embeddings_give_finite_gradients():
    a = jnp.zeros((4, 3))
    value, gradient = jax.value_and_grad(lambda a: losses.nt_xent(a, a, temperature=0.1))(a)
    assert np.isclose(value, np.log(7))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: losses.nt_xent(jnp.ones((4, 2)), jnp.ones((3, 2)), temperature=0.1),
            'row-aligned',
        ),
        (lambda: losses.nt_xent(jnp.ones((4, 2)), jnp.ones((4, 2)), temperature=0), 'temperature'),
        (
            lambda: losses.info_nce(
                jnp.ones((4, 2)), jnp.ones((4, 2)), jnp.ones((5, 3)), temperature=0.1
            ),
            r'\[K, 2\]',
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
