"""LeJEPA: what its statistic says of embeddings, on any number of devices; views and steps.

The values and gradients of its losses are in test_losses_joint.py.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import losses, parallel
from contrastive_jax.config import UserError, build

VIT = {'name': 'vit', 'width': 16, 'depth': 1, 'heads': 2, 'patch': 4}
SMALL = {'directions': 8, 'embedding': 6, 'hidden': 12, 'projection': 5}


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def statistic(x, M=128, **options):
    return float(jax.jit(functools.partial(losses.sigreg, **options))(x, gaussian(M, x.shape[1])))


def test_a_gaussian_is_near_its_expectation_and_all_else_is_above():
    """Of N(0, 1): ∫ (1 − exp(−t²)) exp(−t²/2) dt = √(2π) − √(2π/3), whatever B is."""
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    found = {B: statistic(gaussian(B, 8, seed=B)) for B in (64, 1024)}
    for value in found.values():
        assert abs(value - expected) < 0.35
    x = gaussian(1024, 8, seed=3)
    others = {
        'collapsed': 0 * x,
        'a plane': x * np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32),
        'wide': 2 * x,
        'narrow': 0.5 * x,
        'away': x + 1,
        'corners': np.sign(x) @ np.linalg.qr(gaussian(8, 8, seed=4))[0],
    }
    for name, y in others.items():
        assert statistic(y) > 1.5 * found[1024], name


def test_more_knots_and_a_wider_integral_change_little():
    """Algorithm 1 has 17 on [−5, 5]; the authors' package 33 on [−3, 3]."""
    x = np.sign(gaussian(256, 4, seed=5))
    fine = statistic(x, limit=8.0, knots=401)
    assert math.isclose(statistic(x), fine, rel_tol=5e-3)
    assert math.isclose(statistic(x, limit=3.0, knots=33), fine, rel_tol=5e-2)


def test_gradient_descent_spreads_points_as_a_gaussian():
    """From two dimensions of eight, with few directions that are new in each step."""
    x = gaussian(256, 8, seed=6) * np.array([1, 1] + [0.1] * 6, np.float32)

    @jax.jit
    def step(x, key):
        slope = jax.grad(losses.sigreg)(x, jax.random.normal(key, (16, 8)))
        return x - 3.0 * slope

    before = statistic(x)
    for i in range(150):
        x = step(x, jax.random.key(i))
    assert statistic(x) < 0.1 * before
    np.testing.assert_allclose(np.cov(np.asarray(x).T), np.eye(8), atol=0.25)


def test_no_row_travels_between_devices():
    """Characteristic functions are means over rows: their sums are all that devices exchange."""
    B, V, D, M = 512, 3, 24, 40
    mesh = parallel.make_mesh()
    z = jax.ShapeDtypeStruct((B, V, D), jnp.float32, sharding=parallel.rows(mesh))
    directions = jax.ShapeDtypeStruct((M, D), jnp.float32)
    run = jax.value_and_grad(functools.partial(losses.lejepa, global_views=2), has_aux=True)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(z, directions).compile().as_text()
    moved = re.findall(r'= (.*?) (?:all-|collective-permute|reduce-scatter)', text)
    assert moved, 'eight devices must talk to each other'
    for shapes in moved:
        for dims in re.findall(r'\w+\[([\d,]*)\]', shapes):
            assert math.prod(int(d) for d in dims.split(',') if d) <= 9 * M * V


def method(**options):
    model = build('models', VIT, 'test')
    return build('methods', {'name': 'lejepa', **SMALL, **options}, 'test', model)


def batch(views, local=0):
    found = {'views': jnp.asarray(gaussian(8, views, 8, 8, 3))}
    return found | ({'local_views': jnp.asarray(gaussian(8, local, 4, 4, 3))} if local else {})


@pytest.mark.parametrize(('views', 'local'), [(2, 0), (4, 0), (2, 3), (1, 2)])
def test_any_number_of_views(views, local):
    """The mean is over the global ones, the Gaussian term over all; keys draw directions."""
    m, given = method(), batch(views, local)
    params, extra = m.init(jax.random.key(0), given, 10)
    loss = jax.jit(lambda key: m.loss(params, extra, given, key, jnp.float32(0)))
    value, aux = loss(jax.random.key(1))
    parts = aux.metrics
    assert np.isclose(value, 0.95 * parts['prediction'] + 0.05 * parts['sigreg'], rtol=1e-5)
    other = loss(jax.random.key(2))[1].metrics
    assert np.isclose(other['prediction'], parts['prediction'], rtol=1e-5)
    assert not np.isclose(other['sigreg'], parts['sigreg'], rtol=1e-4)


def test_one_view_is_refused():
    m = method()
    params, extra = m.init(jax.random.key(0), batch(1), 10)
    with pytest.raises(UserError, match=r'config\.inputs\.views: got 1; lejepa'):
        m.loss(params, extra, batch(1), jax.random.key(0), jnp.float32(0))


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'weight': 1.5}, r'weight: got 1.5; lejepa expects'),
        ({'directions': 0}, r'directions: got 0; lejepa expects'),
        ({'embedding': -1}, r'embedding: got -1; lejepa expects'),
        ({'limit': 0.0}, r'limit: got 0.0; lejepa expects'),
        ({'knots': 16}, r'knots: got 16; lejepa expects an odd number'),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(UserError, match=said):
        method(**options)
