"""Targets of a teacher against their papers' formulas in NumPy, and what losses of them leave out.

Dimension key: B images, K prototypes, R rows, G and V views.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_jax import losses, parallel


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def sinkhorn_oracle(scores, temperature, iterations):
    """SwAV's pseudo-code."""
    Q = np.exp((scores - scores.max()) / temperature)
    Q = Q / Q.sum()
    B, K = Q.shape
    for _ in range(iterations):
        for k in range(K):
            Q[:, k] /= Q[:, k].sum() * K
        for b in range(B):
            Q[b] /= Q[b].sum() * B
    return Q * B


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize(('B', 'K', 'iterations'), [(8, 5, 1), (16, 24, 3), (32, 3, 10)])
def test_sinkhorn_equals_the_pseudo_code(B, K, iterations, devices):
    rng = np.random.default_rng(B)
    scores = rng.uniform(-1, 1, (B, K)).astype(np.float32)
    expected = sinkhorn_oracle(scores.astype(np.float64), 0.05, iterations)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: losses.sinkhorn(x, temperature=0.05, iterations=iterations))
        got = run(jax.device_put(scores, parallel.rows(mesh)))
    assert got.dtype == jnp.float32
    # exp of scores up to 20 that are rounded to float32.
    assert np.abs(got - expected).max() <= 2e-5
    assert np.allclose(got.sum(1), 1, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=24, max_size=24),
    temperature=st.sampled_from([0.03, 0.07, 1.0]),
)
def test_sinkhorn_of_hostile_scores(values, temperature):
    """Equal rows, scores that are 10⁵ apart: finite, and every row sums to 1."""
    got = SINKHORN(np.asarray(values, np.float32).reshape(6, 4), np.float32(temperature))
    assert (got >= 0).all()
    assert np.allclose(got.sum(1), 1, atol=1e-6)
    assert np.isfinite(got).all()


SINKHORN = jax.jit(lambda x, temperature: losses.sinkhorn(x, temperature=temperature))


def test_sinkhorn_uses_all_prototypes_alike():
    scores = np.random.default_rng(5).normal(size=(64, 8)) + np.arange(8)  # one wins everywhere
    run = jax.jit(lambda x: losses.sinkhorn(x, temperature=0.5, iterations=20))
    got = run(jnp.asarray(scores, jnp.bfloat16))
    assert np.allclose(got.sum(0), 8, rtol=0.02)


@pytest.mark.parametrize('devices', [1, 8])
def test_sinkhorn_leaves_rows_out(devices):
    """As if they were not there, whatever they hold; their result is 0."""
    rng = np.random.default_rng(6)
    scores = rng.uniform(-1, 1, (16, 5)).astype(np.float32)
    weights = (rng.uniform(size=16) < 0.6).astype(np.float32)
    expected = sinkhorn_oracle(scores[weights > 0].astype(np.float64), 0.05, 3)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x, w: losses.sinkhorn(x, temperature=0.05, weights_B=w))
        for garbage in (0, 1e30, -1e30, np.nan):
            scores[weights == 0] = garbage
            got = np.asarray(run(*jax.device_put((scores, weights), parallel.rows(mesh))))
            assert not got[weights == 0].any()
            assert np.allclose(got[weights > 0], expected, atol=2e-5)
        assert not np.any(run(scores, 0 * weights))


@pytest.mark.parametrize('loss', ['sinkhorn', 'swapped'])
def test_no_row_travels_between_devices(loss):
    """Only sums over rows do, however many prototypes and views there are."""
    B, V, K = 512, 4, 96
    mesh = parallel.make_mesh()
    scores = jax.ShapeDtypeStruct((B, K), jnp.float32, sharding=parallel.rows(mesh))
    views = jax.ShapeDtypeStruct((B, V, K), jnp.float32, sharding=parallel.rows(mesh))
    swapped = jax.value_and_grad(functools.partial(losses.swapped, temperature=0.1), (0, 1))
    call, inputs = {
        'sinkhorn': (functools.partial(losses.sinkhorn, temperature=0.05), (scores,)),
        'swapped': (swapped, (views, views)),
    }[loss]
    with jax.set_mesh(mesh):
        text = jax.jit(call).lower(*inputs).compile().as_text()
    moved = re.findall(r'= (.*?) (?:all-|collective-permute|reduce-scatter)', text)
    assert moved, 'eight devices must talk to each other'
    for shapes in moved:
        for dims in re.findall(r'\w+\[([\d,]*)\]', shapes):
            assert math.prod(int(d) for d in dims.split(',') if d) <= K


def test_targets_have_no_gradient():
    x, centre = jnp.arange(12.0).reshape(4, 3), jnp.zeros(3)
    for target in (
        lambda x: losses.sinkhorn(x, temperature=0.1),
        lambda x: losses.teacher(x, centre, 0.1),
        lambda x: losses.centre(x, centre, 0.9),
        lambda x: losses.target_entropies(jax.nn.softmax(x))['target_entropy'],
    ):
        squares = jax.jit(jax.grad(lambda x, target=target: jnp.sum(target(x) ** 2)))
        assert not np.any(squares(x))


@pytest.mark.parametrize('shape', [(6, 3), (4, 2, 3)])
def test_centre_and_teacher_equal_dino(shape):
    rng = np.random.default_rng(7)
    logits, centre = rng.normal(size=shape), rng.normal(size=3)
    x, c = jnp.asarray(logits, jnp.float32), jnp.asarray(centre, jnp.float32)
    moved = 0.9 * centre + 0.1 * logits.reshape(-1, 3).mean(0)
    run = jax.jit(lambda x, c: (losses.centre(x, c, 0.9), losses.teacher(x, c, 0.04)))
    got_centre, got_targets = run(x, c)
    assert np.allclose(got_centre, moved, rtol=1e-5, atol=1e-6)
    targets = np.stack([softmax((row - centre) / 0.04) for row in logits.reshape(-1, 3)])
    assert np.allclose(got_targets, targets.reshape(shape), atol=2e-5)


def test_a_centre_of_rows_that_count_for_more_or_not_at_all():
    rng = np.random.default_rng(9)
    logits, centre = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=3)
    weights = np.array([2, 0, 1, 5, 0], np.float32)
    run = jax.jit(lambda x, c, w: losses.centre(x, c, 0.9, w))
    mean = (weights[:, None] * np.float64(logits)).sum(0) / weights.sum()
    c = jnp.asarray(centre, jnp.float32)
    np.testing.assert_allclose(run(logits, c, weights), 0.9 * centre + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(run(logits, c, 0 * weights), c, rtol=1e-6)


@pytest.mark.parametrize('devices', [1, 8])
def test_entropies_of_targets(devices):
    """Float64; and the two collapses: all uniform, and all on one."""
    targets = np.random.default_rng(10).dirichlet(np.full(5, 0.3), (16, 2)).astype(np.float32)
    targets[0, 0] = [0, 1, 0, 0, 0]
    mean = np.float64(targets).mean((0, 1))

    def entropy(p):
        p = np.float64(p)
        return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)

    with jax.set_mesh(mesh := parallel.make_mesh(jax.devices()[:devices])):
        run = jax.jit(losses.target_entropies)
        got = run(jax.device_put(targets, parallel.rows(mesh)))
        uniform = run(np.full((16, 5), 0.2, np.float32))
        one = run(np.eye(5, dtype=np.float32)[np.zeros(16, int)])
    np.testing.assert_allclose(got['target_entropy'], entropy(targets).mean(), rtol=1e-5)
    np.testing.assert_allclose(got['target_mean_entropy'], entropy(mean), rtol=1e-5)
    np.testing.assert_allclose(list(uniform.values()), np.log(5), rtol=1e-5)
    np.testing.assert_allclose(list(one.values()), 0, atol=1e-6)


def test_masked_rows_of_weight_0_add_nothing():
    rng = np.random.default_rng(8)
    targets = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    weights = np.array([0.5, 0, 0.25, 0, 0.25, 0], np.float32)
    kept = weights > 0
    both = jax.jit(jax.value_and_grad(functools.partial(losses.masked, temperature=0.1), (0, 1)))
    value, gradients = both(targets[kept], logits[kept], weights[kept])
    for garbage in (0, 3e38, -3e38):
        targets[~kept] = logits[~kept] = garbage
        got, got_d = both(targets, logits, weights)
        assert np.isclose(got, value, rtol=1e-6)
        for g, e in zip(got_d, gradients, strict=True):
            assert np.allclose(g[kept], e, rtol=1e-6)
            assert not np.any(g[~kept])
    assert both(targets, logits, 0 * weights)[0] == 0.0


def test_swapped_skips_the_targets_own_view():
    """Two views, two targets: SwAV's two terms. One target: of all views but the first."""
    run = jax.jit(functools.partial(losses.swapped, temperature=1.0))
    targets = np.eye(4, dtype=np.float32)[None, :2]
    logits = 40 * targets[:, ::-1]  # each predicts the other's target
    assert np.isclose(run(targets, logits), 0, atol=1e-6)
    assert np.isclose(run(targets, logits[:, ::-1]), 40)
    assert np.isclose(run(targets[:, :1], logits[:, [0, 1, 1]]), 0, atol=1e-6)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda x: losses.sinkhorn(x, temperature=0.0), 'temperature'),
        (lambda x: losses.sinkhorn(x, temperature=1.0, iterations=0), 'iterations'),
        (lambda x: losses.sinkhorn(x, temperature=1.0, weights_B=jnp.ones(3)), 'weights'),
        (lambda x: losses.swapped(x[:, None], x[:, None], temperature=1.0), 'at least 2'),
        (lambda x: losses.swapped(x[None], x[None, :3], temperature=1.0), 'V ≥ G'),
        (lambda x: losses.centre(x, x[0, :1], 0.9), 'centre'),
        (lambda x: losses.centre(x, x[0], 1.1), 'momentum'),
        (lambda x: losses.centre(x, x[0], 0.9, jnp.ones(3)), 'one a row'),
        (lambda x: losses.target_entropies(x[0]), 'targets'),
        (lambda x: losses.teacher(x, x[0], 0.0), 'temperature'),
        (lambda x: losses.masked(x, x, x[:3, 0], temperature=1.0), 'one a row'),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 2)))
