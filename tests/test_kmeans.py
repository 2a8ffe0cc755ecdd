"""k-means against scikit-learn and loops, on one device and on eight; PCL's concentration."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from contrastive_jax import parallel
from contrastive_jax.networks import kmeans as module
from contrastive_jax.networks.kmeans import concentration, kmeans

run = jax.jit(kmeans, static_argnames=('k', 'iterations', 'spherical', 'tile'))


def blobs(n: int, centres: int, width: int = 6, spread: float = 0.5):
    """Rows of overlapping clusters, a tenth of them padding that holds NaN."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(centres, width))[rng.integers(0, centres, n)]
    x = (x + spread * rng.normal(size=(n, width))).astype(np.float32)
    counts = (rng.random(n) > 0.1).astype(np.float32)
    x[counts == 0] = np.nan
    return x, counts


def first(x, counts, k, key):
    """The centroids that `kmeans` starts from."""
    start_key, _ = jax.random.split(key)
    counts = jnp.asarray(counts, bool)
    x = jnp.where(counts[:, None], x, 0.0)
    return np.asarray(module._draw(start_key, x, counts, k), np.float64)


@pytest.mark.parametrize(('k', 'tile'), [(1, 1024), (7, 64), (20, 7)])
def test_scikit_learn_agrees(k, tile):
    x, counts = blobs(250, 7)
    key = jax.random.key(k)
    centroids, assignment, distance = run(x, counts, k, key=key, iterations=60, tile=tile)
    real = counts > 0
    start = first(x, counts, k, key)
    assert len(np.unique(start, axis=0)) == k  # different rows, and rows that count
    assert all(np.abs(x[real] - c).sum(1).min() == 0 for c in start)
    judge = KMeans(k, init=start, n_init=1, max_iter=300, tol=0, algorithm='lloyd')
    judge.fit(x[real].astype(np.float64))
    assert np.array_equal(assignment[real], judge.labels_)
    np.testing.assert_allclose(centroids, judge.cluster_centers_, atol=1e-5)
    np.testing.assert_allclose((distance**2).sum(), judge.inertia_, rtol=1e-5)
    assert assignment.dtype == jnp.int32
    assert np.all(assignment[~real] == -1)
    assert not np.any(distance[~real])


@pytest.mark.parametrize('spherical', [False, True])
def test_one_iteration_is_lloyds(spherical):
    x, counts = blobs(120, 4)
    key, k = jax.random.key(3), 5
    got = run(x, counts, k, key=key, iterations=1, spherical=spherical)
    rows = x[counts > 0].astype(np.float64)
    start = first(x, counts, k, key)
    if spherical:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        start = start / np.linalg.norm(start, axis=1, keepdims=True)
    nearest = [min(range(k), key=lambda c: ((row - start[c]) ** 2).sum()) for row in rows]
    means = np.stack([rows[np.asarray(nearest) == c].mean(0) for c in range(k)])
    if spherical:
        means = means / np.linalg.norm(means, axis=1, keepdims=True)
        nearest = [int(np.argmax(means @ row)) for row in rows]  # by cosine
    else:
        nearest = [min(range(k), key=lambda c: ((row - means[c]) ** 2).sum()) for row in rows]
    np.testing.assert_allclose(got[0], means, atol=1e-5)
    assert np.array_equal(got[1][counts > 0], nearest)
    distance = np.linalg.norm(rows - means[nearest], axis=1)
    np.testing.assert_allclose(got[2][counts > 0], distance, atol=1e-5)


@pytest.mark.parametrize('n', [240, 173])  # divides by eight, and does not
def test_devices_do_not_matter(n):
    x, counts = blobs(n, 9)
    results = []
    for devices in (1, 8):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        with jax.set_mesh(mesh):
            rows = parallel.shard_batch(mesh, {'x': x, 'c': counts}) if n == 240 else None
            x_, counts_ = (rows['x'], rows['c']) if rows else (x, counts)
            results.append(run(x_, counts_, 12, key=jax.random.key(0), iterations=10))
    (c1, a1, d1), (c8, a8, d8) = results
    assert np.array_equal(a1, a8)
    np.testing.assert_allclose(c1, c8, atol=1e-5)
    np.testing.assert_allclose(d1, d8, atol=1e-5)


def test_rows_stay_where_they_are():
    """On eight devices nothing holds N x k numbers, and no device all N x D."""
    n, width, k, tile = 4096, 24, 640, 64
    mesh = parallel.make_mesh()
    rows = parallel.rows(mesh)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((n, width), jnp.float32, sharding=rows)
        counts = jax.ShapeDtypeStruct((n,), jnp.float32, sharding=rows)
        key = jax.eval_shape(lambda: jax.random.key(0))
        text = run.lower(x, counts, k, key=key, tile=tile).compile().as_text()
    sizes = {
        int(np.prod([int(d) for d in shape.split(',')]))
        for shape in re.findall(r'(?:f32|s32|pred|bf16)\[([\d,]+)\]', text)
    }
    # The largest are a device's rows, the centroids and the random numbers of all rows.
    assert max(sizes) < n * width // 4
    assert n // 8 * k > n * width // 4  # so a device's share of the scores would have shown


def test_every_row_its_own_cluster():
    x, counts = blobs(40, 3)
    real = counts > 0
    k = int(real.sum())
    centroids, assignment, distance = run(x, counts, k, key=jax.random.key(1), iterations=3)
    assert len(np.unique(assignment[real])) == k
    assert not np.any(distance)
    # More clusters than rows that count: the rest are copies, and stay empty.
    centroids, assignment, distance = run(x, counts, 40, key=jax.random.key(1), iterations=3)
    assert np.isfinite(centroids).all()
    assert not np.any(distance)


def test_an_empty_cluster_starts_again():
    """All but three rows are equal: clusters that share a place are empty until one is found."""
    x = np.ones((100, 2), np.float32)
    x[[7, 50, 99]] = [[0, 5], [5, 0], [9, 9]]
    counts = np.ones(100, bool)
    few = run(x, counts, 4, key=jax.random.key(0), iterations=1)
    many = run(x, counts, 4, key=jax.random.key(0), iterations=400)
    assert few[2].max() > 1
    np.testing.assert_allclose(many[2], np.zeros(100), atol=1e-6)
    assert len(np.unique(many[1])) == 4


@pytest.mark.parametrize(
    ('change', 'parts'),
    [
        ({'k': 9}, ['from 1 to the 8 rows', '9']),
        ({'k': 0}, ['from 1', '0']),
        ({'iterations': 0}, ['iterations', 'at least 1']),
        ({'counts_N': np.ones(7)}, ['(8, 3)', '(7,)']),
        ({'x_ND': np.ones(8)}, ['[N, D]', '(8,)']),
    ],
)
def test_errors_say_what_to_do(change, parts):
    arguments = {'x_ND': np.ones((8, 3)), 'counts_N': np.ones(8), 'k': 2}
    with pytest.raises(ValueError, match=r'^kmeans') as error:
        kmeans(**{**arguments, **change}, key=jax.random.key(0))
    for part in parts:
        assert part in str(error.value)


def test_concentration_is_pcls():
    rng = np.random.default_rng(0)
    n, k, alpha, temperature = 300, 12, 10.0, 0.2
    assignment = rng.integers(0, k - 2, n).astype(np.int32)  # cluster k − 2 is empty
    counts = rng.random(n) > 0.2
    assignment[0], counts[0] = k - 1, True  # and k − 1 has one row
    distance = (rng.random(n) * (1 + assignment)).astype(np.float32)
    distance[~counts] = np.nan
    phi = np.zeros(k)
    for c in range(k):
        members = [float(distance[i]) for i in range(n) if counts[i] and assignment[i] == c]
        if len(members) > 1:
            phi[c] = sum(members) / (len(members) * np.log(len(members) + alpha))
    phi[k - 2 :] = phi.max()
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    phi = phi / phi.mean() * temperature
    call = jax.jit(partial(concentration, k=k, alpha=alpha, temperature=temperature))
    np.testing.assert_allclose(call(distance, assignment, counts), phi, rtol=1e-5)
    np.testing.assert_allclose(call(distance, assignment, counts).mean(), temperature, rtol=1e-5)
    # Where every row lies on its centroid there is nothing to tell clusters apart by.
    np.testing.assert_allclose(call(0 * assignment, assignment, counts), np.full(k, temperature))


@pytest.mark.parametrize(
    ('change', 'part'),
    [({'k': 0}, 'k must'), ({'alpha': 0.0}, 'alpha'), ({'temperature': -1}, 'temperature')],
)
def test_concentration_errors(change, part):
    x, cluster = np.ones(4), np.ones(4, np.int32)
    with pytest.raises(ValueError, match=part):
        concentration(x, cluster, x, **{'k': 2, **change})
    with pytest.raises(ValueError, match=r'\(4,\), \(3,\)'):
        concentration(x, cluster[:3], x, 2)
