"""Losses of joint-embedding methods against their papers' formulas, in float64 NumPy loops.

Gradients are held to differences of those loops, one entry at a time.

Dimension key: B images, D embedding, K prototypes or negatives, R rows, G and V views.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import losses, parallel

TOLERANCE = 3e-6  # relative, float32 against float64
STEP = 1e-5  # of the differences, whose own error is about its square


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


# --- one formula each ----------------------------------------------------------------------------


def info_nce_oracle(query, positive, temperature):
    """Every query against the positives of all."""
    total, query, positive = 0.0, unit(query), unit(positive)
    for i in range(len(query)):
        scores = [query[i] @ p / temperature for p in positive]
        total -= np.log(softmax(np.array(scores))[i])
    return total / len(query)


def proto_nce_oracle(embeddings, prototypes, concentration, assignment, negatives=None):
    total, embeddings, prototypes = 0.0, unit(embeddings), unit(prototypes)
    for v, s in zip(embeddings, assignment, strict=True):
        candidates = range(len(prototypes)) if negatives is None else negatives
        chosen = [s] + [j for j in candidates if j != s]
        scores = [v @ prototypes[j] / concentration[j] for j in chosen]
        total -= np.log(softmax(np.array(scores))[0])
    return total / len(embeddings)


def barlow_oracle(a, b):
    B, D = a.shape
    a, b = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (a, b))
    total = 0.0
    for i in range(D):
        for j in range(D):
            c = sum(a[n, i] * b[n, j] for n in range(B)) / B
            total += (1 - c) ** 2 if i == j else 0.0051 * c**2
    return total


def vicreg_parts(a, b):
    B, D = a.shape
    invariance = ((a - b) ** 2).sum() / (B * D)
    hinge = covariance = 0.0
    for z in (a, b):
        z = z - z.mean(0)
        for i in range(D):
            hinge += max(0, 1 - np.sqrt((z[:, i] ** 2).sum() / (B - 1) + 1e-4)) / D / 2
            for j in range(D):
                if i != j:
                    covariance += ((z[:, i] * z[:, j]).sum() / (B - 1)) ** 2 / D
    return {'invariance': invariance, 'variance': hinge, 'covariance': covariance}


def vicreg_oracle(a, b):
    parts = vicreg_parts(a, b)
    return 25 * parts['invariance'] + 25 * parts['variance'] + parts['covariance']


def sigreg_oracle(x, directions):
    """Algorithm 1 of LeJEPA: direction by direction, knot by knot, in complex numbers."""
    total, knots = 0.0, np.linspace(-5, 5, 17)
    for a in unit(directions):
        error = []
        for t in knots:
            empirical = sum(np.exp(1j * t * (a @ row)) for row in x) / len(x)
            error.append(abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2))
        total += len(x) * np.trapezoid(error, knots)
    return total / len(directions)


def lejepa_oracle(z, directions):
    """Algorithm 2, λ = 0.05; two of the views are global."""
    B, V, D = z.shape
    prediction = 0.0
    for i in range(B):
        centre = (z[i, 0] + z[i, 1]) / 2
        prediction += sum(((z[i, v] - centre) ** 2).sum() for v in range(V)) / (B * V * D)
    spread = sum(sigreg_oracle(z[:, v], directions) for v in range(V)) / V
    return 0.95 * prediction + 0.05 * spread


def koleo_oracle(x):
    u = unit(x)
    total = 0.0
    for i in range(len(u)):
        nearest = min(np.sqrt(((u[i] - u[j]) ** 2).sum()) for j in range(len(u)) if j != i)
        total -= np.log(nearest + 1e-8)
    return total / len(u)


def cosine_distance_oracle(prediction, target):
    pairs = zip(prediction, target, strict=True)
    return np.mean([2 - 2 * (unit(p) @ unit(t)) for p, t in pairs])


def swapped_oracle(targets, logits, temperature):
    (B, G, _), V = targets.shape, logits.shape[1]
    terms = [
        -(targets[b, g] * np.log(softmax(logits[b, v] / temperature))).sum()
        for b in range(B)
        for g in range(G)
        for v in range(V)
        if v != g
    ]
    return np.mean(terms)


def masked_oracle(targets, logits, weights, temperature):
    rows = zip(targets, logits, weights, strict=True)
    return sum(-w * (t * np.log(softmax(x / temperature))).sum() for t, x, w in rows)


def two_views(rng, B, D):
    """From nearly equal to unrelated, of lengths that differ."""
    a = rng.normal(size=(B, D))
    b = a + rng.normal(size=(B, D)) * rng.choice([0.1, 1.0])
    return [(x * np.exp(0.5 * rng.normal(size=(B, 1)))).astype(np.float32) for x in (a, b)]


def prototypes(rng, B, D, K=10):
    return (
        rng.normal(size=(B, D)).astype(np.float32),
        rng.normal(size=(K, D)).astype(np.float32),
        rng.uniform(0.1, 0.5, K).astype(np.float32),
        rng.integers(0, K, B),
    )


def distributions(rng, *shape):
    x = rng.exponential(size=shape).astype(np.float32)
    return x / x.sum(-1, keepdims=True)


# name -> (random arguments, the oracle, ours); arguments that are no float32 get no gradient.
CASES = {
    'info_nce': (
        lambda rng, B, D: (*two_views(rng, B, D), np.float32(rng.uniform(0.1, 1))),
        info_nce_oracle,
        lambda q, p, t, **how: losses.info_nce(q, p, temperature=t, **how),
    ),
    'proto_nce': (prototypes, proto_nce_oracle, losses.proto_nce),
    'proto_nce_drawn': (
        lambda rng, B, D: (*prototypes(rng, B, D), rng.choice(10, 6, replace=False)),
        proto_nce_oracle,
        lambda v, c, phi, s, drawn, **how: losses.proto_nce(
            v, c, phi, s, negative_indices_R=drawn, **how
        ),
    ),
    'barlow_twins': (two_views, barlow_oracle, lambda a, b, **_: losses.barlow_twins(a, b)),
    'vicreg': (two_views, vicreg_oracle, lambda a, b, **_: losses.vicreg(a, b)[0]),
    'sigreg': (
        lambda rng, B, D: (two_views(rng, B, D)[0], rng.normal(size=(3, D)).astype(np.float32)),
        sigreg_oracle,
        lambda x, a, **_: losses.sigreg(x, a),
    ),
    'lejepa': (
        lambda rng, B, D: (
            np.stack([*two_views(rng, B, D), *two_views(rng, B, D)[:1]], 1),
            rng.normal(size=(2, D)).astype(np.float32),
        ),
        lejepa_oracle,
        lambda z, a, **_: losses.lejepa(z, a, global_views=2)[0],
    ),
    'koleo': (lambda rng, B, D: two_views(rng, B, D)[:1], koleo_oracle, losses.koleo),
    'cosine_distance': (
        two_views,
        cosine_distance_oracle,
        lambda p, t, **_: losses.cosine_distance(p, t),
    ),
    'swapped': (
        lambda rng, B, D: (
            distributions(rng, B, 2, D),
            rng.normal(size=(B, 5, D)).astype(np.float32),
            np.float32(rng.uniform(0.1, 1)),
        ),
        swapped_oracle,
        lambda t, x, temperature, **_: losses.swapped(t, x, temperature=temperature),
    ),
    'masked': (
        lambda rng, B, D: (
            distributions(rng, B, D),
            rng.normal(size=(B, D)).astype(np.float32),
            rng.uniform(0.1, 1, B).astype(np.float32),
            np.float32(rng.uniform(0.1, 1)),
        ),
        masked_oracle,
        lambda t, x, w, temperature, **_: losses.masked(t, x, w, temperature=temperature),
    ),
}
# Tiles that need padding; eight devices, which share rows evenly.
GRID = {
    (7, 5): [(1, 3, 'auto')],
    (16, 3): [(8, 3, 'ring'), (8, 1024, 'gather')],
}
EXCHANGED = ('proto_nce', 'koleo')


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_equal_the_paper(name):
    draw, oracle, ours = CASES[name]
    for shape, grid in GRID.items():
        inputs = draw(np.random.default_rng(shape), *shape)
        value, gradients = reference(oracle, inputs)
        floats = tuple(i for i, x in enumerate(inputs) if x.dtype == np.float32)
        for devices, tile, exchange in grid if name in EXCHANGED else grid[:1]:
            mesh = parallel.make_mesh(jax.devices()[:devices])
            laid = [on(mesh, x, shape[0]) for x in inputs]
            with jax.set_mesh(mesh):
                call = functools.partial(ours, tile=tile, exchange=exchange)
                got, got_d = jax.device_get(jax.jit(jax.value_and_grad(call, floats))(*laid))
            assert got.dtype == np.float32
            assert abs(got - value) <= TOLERANCE * max(abs(value), 1e-2), (devices, tile)
            for g, e in zip(got_d, gradients, strict=True):
                off = np.linalg.norm(g - e) / max(np.linalg.norm(e), 1e-2)
                assert off <= 3 * TOLERANCE, (devices, tile, off)


def on(mesh, x, B):
    """The rows of a batch over all devices; everything else as it is."""
    return jax.device_put(x, parallel.rows(mesh)) if np.shape(x)[:1] == (B,) else x


def reference(oracle, inputs):
    """The oracle's value, and its central differences in every float32 entry."""
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
    gradients = []
    for i, x in enumerate(inputs):
        if x.dtype != np.float32:
            continue
        gradient = np.zeros(x.shape)
        for entry in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = [np.array(y) for y in wide]
                moved[i][entry] += sign * STEP
                ends.append(oracle(*moved))
            gradient[entry] = (ends[0] - ends[1]) / (2 * STEP)
        gradients.append(gradient)
    return oracle(*wide), gradients


# --- prototypes ----------------------------------------------------------------------------------


def test_its_own_prototype_is_never_a_negative():
    """Drawn or not; one that is drawn twice counts twice; without negatives the loss is 0."""
    v, c, phi, s = map(jnp.asarray, prototypes(np.random.default_rng(0), 6, 4, K=5))
    run = jax.jit(lambda s, drawn: losses.proto_nce(v, c, phi, s, negative_indices_R=drawn))
    drawn = np.array([1, 2, 3, 3])
    assert np.isclose(
        run(s, drawn), proto_nce_oracle(*map(np.asarray, (v, c, phi, s)), drawn), rtol=1e-5
    )
    assert run(np.full(6, 2), np.full(4, 2)) == 0


def test_one_query_alone_has_no_negatives():
    loss = jax.jit(jax.value_and_grad(lambda q: losses.info_nce(q, q + 1, temperature=0.1)))
    value, gradient = loss(jnp.ones((1, 4)))
    assert value == 0.0
    assert np.array_equal(gradient, np.zeros((1, 4)))


# --- redundancy ----------------------------------------------------------------------------------


def test_vicreg_reports_its_terms():
    a, b = two_views(np.random.default_rng(1), 9, 4)
    weights = {'invariance': 2.0, 'variance': 3.0, 'covariance': 5.0}
    loss, parts = jax.jit(lambda a, b: losses.vicreg(a, b, **weights))(a, b)
    expected = vicreg_parts(a.astype(np.float64), b.astype(np.float64))
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert np.isclose(parts[name], value, rtol=1e-5)
    assert np.isclose(loss, sum(weights[name] * parts[name] for name in weights), rtol=1e-6)


def test_constant_dimensions_and_equal_rows_give_finite_losses():
    """Collapsed embeddings: the losses that are there to prevent it must say how bad it is."""
    x = jnp.ones((8, 3))
    cases = {
        'barlow': (lambda x: losses.barlow_twins(x, x), 3.0),
        'vicreg': (lambda x: losses.vicreg(x, x)[0], 25 * 0.99),
        'koleo': (losses.koleo, -np.log(1e-8)),
        'output_std': (losses.output_std, 0.0),
        'cosine': (lambda x: losses.cosine_distance(x, x), 0.0),
    }
    for name, (loss, expected) in cases.items():
        run = jax.jit(jax.value_and_grad(loss))
        assert np.isclose(run(x)[0], expected, atol=1e-6), name
        for hostile in (x, jnp.zeros((8, 3)), 1e4 * x.at[0, 0].set(-1)):
            assert all(np.isfinite(y).all() for y in run(hostile)), name


def test_koleo_of_nearly_collapsed_rows_finds_the_nearest():
    """Where all cosines round to 1, distances do not."""
    rng = np.random.default_rng(2)
    x = (np.ones((12, 6)) + 1e-4 * rng.normal(size=(12, 6))).astype(np.float32)
    # unit() in float32 moves every entry by up to 6e-8 · 0.4, of distances near 1e-4.
    assert np.isclose(jax.jit(losses.koleo)(x), koleo_oracle(x.astype(np.float64)), atol=2e-3)


def test_output_std_is_1_for_even_and_0_for_one_direction():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2000, 16)).astype(np.float32)
    run = jax.jit(jax.value_and_grad(losses.output_std))
    value, gradient = run(x)
    assert np.isclose(value, 1, atol=0.02)
    assert np.isclose(value, 4 * np.mean(unit(x.astype(np.float64)).std(0)), rtol=1e-5)
    assert not np.any(gradient)
    assert run(x[:1] * np.arange(1, 2001, dtype=np.float32)[:, None])[0] < 1e-5


@pytest.mark.parametrize('loss', ['koleo', 'proto_nce'])
def test_no_buffer_of_batch_by_batch(loss):
    """In the compiled program of value and gradient, nothing has two batch-sized dimensions."""
    B, D = 1024, 16
    call = {
        'koleo': lambda a, b, phi, s: losses.koleo(a, tile=32),
        'proto_nce': lambda *inputs: losses.proto_nce(*inputs, tile=32),
    }[loss]
    mesh = parallel.make_mesh()
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=parallel.rows(mesh))
    phi, s = (
        jax.ShapeDtypeStruct((B,), dtype, sharding=parallel.rows(mesh))
        for dtype in (jnp.float32, jnp.int32)
    )
    with jax.set_mesh(mesh):
        text = jax.jit(jax.value_and_grad(call, (0, 1))).lower(x, x, phi, s).compile().as_text()
    for dims in re.findall(r'\w+\[([\d,]+)\]', text):
        large = [int(d) for d in dims.split(',') if int(d) >= B // len(mesh.devices)]
        assert len(large) <= 1, f'a buffer of {dims} grows with the square of the batch'


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['proto_nce', 'barlow_twins', 'vicreg', 'koleo', 'sigreg'])
def test_bfloat16_loses_only_its_own_rounding(name):
    draw, oracle, ours = CASES[name]
    inputs = draw(np.random.default_rng(9), 24, 8)
    narrow = [
        jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 and x.ndim > 1 else x for x in inputs
    ]
    floats = tuple(i for i, x in enumerate(narrow) if x.dtype == jnp.bfloat16)
    value, gradients = jax.jit(jax.value_and_grad(ours, floats))(*narrow)
    rounded = [np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x) for x in narrow]
    expected = oracle(*(x.astype(np.float64) if x.dtype == np.float32 else x for x in rounded))
    assert abs(value - expected) <= TOLERANCE * max(abs(expected), 0.1)
    in_full = jax.jit(jax.grad(ours, floats))(*rounded)
    for g, e in zip(gradients, in_full, strict=True):
        assert g.dtype == jnp.bfloat16
        off = np.linalg.norm(g.astype(jnp.float32) - e)
        assert off <= 2**-7 * np.linalg.norm(e)  # of up to three parts, rounded one by one


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda x: losses.info_nce(x, x[:3], temperature=0.1), 'row-aligned'),
        (lambda x: losses.info_nce(x, x, x[:, :1], temperature=0.1), r'\[K, 2\]'),
        (lambda x: losses.proto_nce(x, x[:, :1], x[:, 0], jnp.arange(4)), r'\[K, 2\]'),
        (lambda x: losses.proto_nce(x, x, x[:3, 0], jnp.arange(4)), 'concentrations'),
        (lambda x: losses.proto_nce(x, x, x[:, 0], x[:, 0]), 'integer labels'),
        (lambda x: losses.barlow_twins(x, x[:3]), 'row-aligned'),
        (lambda x: losses.barlow_twins(x[:1], x[:1]), 'at least 2'),
        (lambda x: losses.vicreg(x, x, eps=0), 'eps'),
        (lambda x: losses.sigreg(x, x[:, :1]), r'directions \[M, 2\]'),
        (lambda x: losses.sigreg(x, x, knots=16), 'odd'),
        (lambda x: losses.sigreg(x, x, limit=0), 'limit'),
        (lambda x: losses.lejepa(x, x, global_views=1), r'\[B, V, D\]'),
        (lambda x: losses.lejepa(x[None], x, global_views=5), '5 global views'),
        (lambda x: losses.koleo(x[:1]), 'at least 2'),
        (lambda x: losses.koleo(x[0]), r'\[B, D\]'),
        (lambda x: losses.output_std(x[0]), r'\[B, D\]'),
        (lambda x: losses.cosine_distance(x, x[:3]), 'row-aligned'),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 2)))
