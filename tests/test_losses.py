"""Losses against their papers' formulas in float64 NumPy loops: values and gradients.

Dimension key: B pairs, K negatives, D embedding, R = 2B views.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_jax import losses, parallel
from contrastive_jax.losses.captions import SAME_TEXT

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


def short_pairs(rng, B, D):
    """For losses of inner products: where these are tens, rounding alone is 2e-6 of a loss."""
    return [x / np.float32(np.sqrt(D)) for x in pairs(rng, B, D)]


# --- every loss against its textbook form --------------------------------------------------------
#
# An oracle is the paper's formula on dense float64 matrices, written for either array module: NumPy
# gives the value, JAX in float64 the gradient of the same lines.


def dense_cosine(xp, a, b):
    return (a / xp.linalg.norm(a, axis=1, keepdims=True)) @ (
        b / xp.linalg.norm(b, axis=1, keepdims=True)
    ).T


def log_mean_exp(xp, x, keep):
    """log of the mean of exp(x) over what is kept, by rows."""
    top = xp.where(keep, x, -xp.inf).max(1)
    total = xp.where(keep, xp.exp(xp.where(keep, x - top[:, None], 0.0)), 0.0).sum(1)
    return top + xp.log(total) - np.log(keep.sum(1))


def log_sum_exp(xp, x, keep):
    return log_mean_exp(xp, x, keep) + np.log(keep.sum(1))


def clip_oracle(same_text='negative'):
    def oracle(xp, image, text, scale, texts=None):
        logits = scale * dense_cosine(xp, image, text)
        own = np.eye(len(image), dtype=bool)
        same = own if texts is None or same_text == 'negative' else texts[:, None] == texts[None]
        # An image's score with a text that equals its own is the score with its own.
        own_score = xp.where(own, logits, 0.0).sum(1)
        logits = xp.where(same, own_score[:, None], logits)
        counts, good = (own | ~same, own) if same_text == 'mask' else (own | True, same)
        total = 0.0
        for side in (logits, logits.T):
            total += (log_sum_exp(xp, side, counts) - log_sum_exp(xp, side, good)).mean()
        return total / 2

    return oracle


def siglip_oracle(same_text='negative'):
    def oracle(xp, image, text, scale, bias, texts=None):
        logits = scale * dense_cosine(xp, image, text) + bias
        own = np.eye(len(image), dtype=bool)
        same = own if texts is None or same_text == 'negative' else texts[:, None] == texts[None]
        z = np.where(same, {'positive': 1, 'mask': 0, 'negative': -1}[same_text], -1)
        z[own] = 1
        return xp.where(z != 0, xp.logaddexp(0.0, -z * logits), 0.0).sum() / len(image)

    return oracle


def sup_con_oracle(log):
    def oracle(xp, views, temperature, labels):
        B, V, D = views.shape
        z, label = views.reshape(B * V, D), np.repeat(labels, V)
        scores = dense_cosine(xp, z, z) / temperature
        others = ~np.eye(B * V, dtype=bool)
        positive = others & (label[:, None] == label[None])
        anchors = positive.any(1)
        if not anchors.any():
            return xp.sum(0.0 * z)
        scores, others, positive = scores[anchors], others[anchors], positive[anchors]
        log_total = log_mean_exp(xp, scores, others) + np.log(others.sum(1))
        if log == 'out':
            of_positives = xp.where(positive, scores, 0.0).sum(1) / positive.sum(1)
        else:
            of_positives = log_mean_exp(xp, scores, positive)
        return (log_total - of_positives).mean()

    return oracle


def n_pair_oracle(xp, anchor, positive, labels=None):
    scores = anchor @ positive.T
    own = np.eye(len(anchor), dtype=bool)
    labels = np.arange(len(anchor)) if labels is None else labels
    counts = own | (labels[:, None] != labels[None])
    correct = xp.where(own, scores, 0.0).sum(1)
    softmax = log_mean_exp(xp, scores, counts) + np.log(counts.sum(1))
    penalty = (anchor**2).sum(1) + (positive**2).sum(1)
    return (softmax - correct).mean() + 0.02 * penalty.mean()


def distances(xp, x, distance, linear=None):
    if distance == 'cosine':
        return 1 - dense_cosine(xp, x, x)
    x = x if linear is None else x @ linear.T
    square = ((x[:, None, :] - x[None, :, :]) ** 2).sum(-1)
    if distance == 'squared_euclidean':
        return square
    apart = square > 0
    return xp.where(apart, xp.sqrt(xp.where(apart, square, 1.0)), 0.0)


def max_margin_oracle(distance):
    def oracle(xp, x, *rest):
        *linear, labels = rest
        d = distances(xp, x, distance, *linear)
        same = labels[:, None] == labels[None]
        loss = xp.where(same, d**2, xp.maximum(0.5 - d, 0.0) ** 2) / 2
        B = len(x)
        return xp.where(np.eye(B, dtype=bool), 0.0, loss).sum() / (B * (B - 1))

    return oracle


def triplet_oracle(mining, distance):
    """One triplet at a time."""

    def oracle(xp, x, labels):
        d = distances(xp, x, distance)
        chosen = distances(np, np.asarray(jax.lax.stop_gradient(x)), distance)
        triplets = []
        for a in range(len(x)):
            positives = [p for p in range(len(x)) if p != a and labels[p] == labels[a]]
            negatives = [n for n in range(len(x)) if labels[n] != labels[a]]
            if not positives or not negatives:
                continue
            if mining == 'batch_hard':
                p = max(positives, key=lambda p: chosen[a, p])
                pairs = [(p, min(negatives, key=lambda n: chosen[a, n]))]
            elif mining == 'all':
                pairs = [(p, n) for p in positives for n in negatives]
            else:
                pairs = []
                for p in positives:
                    farther = [n for n in negatives if chosen[a, n] > chosen[a, p]]
                    nearest = min(farther, key=lambda n: chosen[a, n]) if farther else None
                    farthest = max(negatives, key=lambda n: chosen[a, n])
                    pairs.append((p, farthest if nearest is None else nearest))
            triplets += [(a, p, n) for p, n in pairs]
        if not triplets:
            return xp.sum(0.0 * x)
        a, p, n = np.array(triplets).T
        return xp.maximum(d[a, p] - d[a, n] + 0.3, 0.0).mean()

    return oracle


def two_views(rng, B, D):
    return (*pairs(rng, B, D), np.float32(np.exp(rng.uniform(0, 3))))


def labelled(rng, B, D):
    """Embeddings and labels, some of which occur once."""
    return rng.normal(size=(B, D)).astype(np.float32), rng.integers(0, max(2, B // 3), B)


# name -> (random arguments, of which the trailing integers are labels, the oracle, ours)
CASES = {
    'clip': (two_views, clip_oracle(), losses.clip),
    'siglip': (
        lambda rng, B, D: (*two_views(rng, B, D), np.float32(rng.normal())),
        siglip_oracle(),
        losses.siglip,
    ),
    'n_pair': (
        short_pairs,
        n_pair_oracle,
        lambda a, p, **how: losses.n_pair(a, p, l2=0.02, **how),
    ),
    'n_pair_labels': (
        lambda rng, B, D: (*short_pairs(rng, B, D), labelled(rng, B, D)[1]),
        n_pair_oracle,
        lambda a, p, labels, **how: losses.n_pair(a, p, labels, l2=0.02, **how),
    ),
    'max_margin_mahalanobis': (
        lambda rng, B, D: (
            labelled(rng, B, D)[0] / np.float32(np.sqrt(2 * D)),
            rng.normal(size=(5, D)).astype(np.float32) / np.float32(np.sqrt(5)),
            labelled(rng, B, D)[1],
        ),
        max_margin_oracle('mahalanobis'),
        lambda x, linear, labels, **how: losses.max_margin(
            x, labels, margin=0.5, distance='mahalanobis', map_KD=linear, **how
        ),
    ),
}


def scores_of_records(xp, a, b, temperature, records):
    """The mean over a of log Σ exp − own, without other pairs of one record."""
    scores = dense_cosine(xp, a, b) / temperature
    own = np.eye(len(a), dtype=bool)
    counts = own | (records[:, None] != records[None])
    return (log_sum_exp(xp, scores, counts) - xp.where(own, scores, 0.0).sum(1)).mean()


def nt_xent_records(xp, a, b, temperature, records):
    """As the paper, of views whose pairs are put together: row i's partner is i ± B."""
    views, B = xp.concatenate([a, b]), len(records)
    scores = dense_cosine(xp, views, views) / temperature
    partner = np.roll(np.eye(2 * B, dtype=bool), B, axis=1)
    records = np.tile(records, 2)
    counts = partner | (records[:, None] != records[None])
    return (log_sum_exp(xp, scores, counts) - xp.where(partner, scores, 0.0).sum(1)).mean()


for name, oracle, loss in (
    ('nt_xent_records', nt_xent_records, losses.nt_xent),
    ('info_nce_records', scores_of_records, losses.info_nce),
):
    CASES[name] = (
        lambda rng, B, D: (
            *pairs(rng, B, D),
            np.float32(rng.uniform(0.05, 1)),
            labelled(rng, B, D)[1],
        ),
        oracle,
        lambda a, b, t, records, loss=loss, **how: loss(
            a, b, temperature=t, record_B=records, **how
        ),
    )
CASES['clip_records'] = (
    lambda rng, B, D: (*two_views(rng, B, D), labelled(rng, B, D)[1]),
    lambda xp, image, text, scale, records: (
        (
            scores_of_records(xp, image, text, 1 / scale, records)
            + scores_of_records(xp, text, image, 1 / scale, records)
        )
        / 2
    ),
    lambda a, b, scale, records, **how: losses.clip(a, b, scale, record_B=records, **how),
)
CASES['siglip_records'] = (
    lambda rng, B, D: (*two_views(rng, B, D), np.float32(rng.normal()), labelled(rng, B, D)[1]),
    siglip_oracle('mask'),
    lambda a, b, scale, bias, records, **how: losses.siglip(
        a, b, scale, bias, record_B=records, **how
    ),
)
for same_text in SAME_TEXT:
    CASES[f'clip_{same_text}'] = (
        lambda rng, B, D: (*two_views(rng, B, D), labelled(rng, B, D)[1]),
        clip_oracle(same_text),
        functools.partial(losses.clip, same_text=same_text),
    )
    CASES[f'siglip_{same_text}'] = (
        lambda rng, B, D: (
            *two_views(rng, B, D),
            np.float32(rng.normal()),
            labelled(rng, B, D)[1],
        ),
        siglip_oracle(same_text),
        functools.partial(losses.siglip, same_text=same_text),
    )
for log in ('out', 'in'):
    CASES[f'sup_con_{log}'] = (
        lambda rng, B, D: (
            rng.normal(size=(B, int(rng.integers(1, 4)) if B < 20 else 2, D)).astype(np.float32),
            np.float32(rng.uniform(0.05, 1)),
            rng.integers(0, 5, B),
        ),
        sup_con_oracle(log),
        lambda z, t, labels, log=log, **how: losses.sup_con(z, labels, t, log=log, **how),
    )
for distance in ('euclidean', 'squared_euclidean', 'cosine'):
    CASES[f'max_margin_{distance}'] = (
        lambda rng, B, D: (
            labelled(rng, B, D)[0] / np.float32(np.sqrt(4 * D)),
            rng.integers(0, 4, B),
        ),
        max_margin_oracle(distance),
        lambda x, labels, distance=distance, **how: losses.max_margin(
            x, labels, margin=0.5, distance=distance, **how
        ),
    )
for mining in ('all', 'semi_hard', 'batch_hard'):
    CASES[f'triplet_{mining}'] = (
        labelled,
        triplet_oracle(mining, 'euclidean'),
        lambda x, labels, mining=mining, **_: losses.triplet(x, labels, margin=0.3, mining=mining),
    )

# Shapes that divide by nothing, that are smaller than the mesh, and that fill several tiles.
NT_XENT_SHAPES = [(1, 8), (3, 2), (16, 33), (37, 64), (64, 16)]
INFO_NCE_SHAPES = [(1, 5, 8), (6, 1, 3), (16, 64, 32), (11, 50, 17)]
SHAPES = [(2, 8), (13, 33), (32, 16)]
# Every count of devices, every tile and both exchanges; the slow tests take all of them.
FEW = [(1, 3, 'auto'), (2, 16, 'ring'), (4, 1024, 'gather'), (8, 16, 'ring'), (8, 5, 'gather')]
ALL = [
    (devices, tile, exchange)
    for devices in (1, 2, 4, 8)
    for tile in (3, 16, 1024)
    for exchange in (('ring', 'gather') if devices > 1 else ('auto',))
]


@pytest.mark.parametrize('shape', NT_XENT_SHAPES)
def test_nt_xent_equals_the_paper(shape):
    """200 cases in all, 40 a shape."""
    check_nt_xent(shape, FEW)


@pytest.mark.parametrize('shape', INFO_NCE_SHAPES)
def test_info_nce_equals_the_paper(shape):
    """60 cases in all, 15 a shape."""
    check_info_nce(shape, FEW)


@pytest.mark.parametrize('name', CASES)
def test_loss_equals_its_textbook_form(name):
    """Two devices' ring or eight devices' gather, a shape each; the slow test takes all."""
    check_case(name, SHAPES[1:2], [FEW[1], FEW[4]], 4)


@pytest.mark.slow
@pytest.mark.parametrize('case', [*NT_XENT_SHAPES, *INFO_NCE_SHAPES, *CASES], ids=str)
def test_losses_equal_the_papers_on_all_devices_and_tiles(case):
    if case in CASES:
        check_case(case, SHAPES, ALL, 10)
    else:
        (check_nt_xent if case in NT_XENT_SHAPES else check_info_nce)(case, ALL)


def check_nt_xent(shape, grid):
    rng = np.random.default_rng(shape[0])
    cases = []
    for _ in range(40):
        a, b = pairs(rng, *shape)
        temperature = np.float32(np.exp(rng.uniform(np.log(0.05), 0)))
        cases.append(((a, b, temperature), nt_xent_oracle(a, b, temperature)))
    worst = _worst(lambda a, b, t, **how: losses.nt_xent(a, b, temperature=t, **how), cases, grid)
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
        lambda q, p, n, t, **how: losses.info_nce(q, p, n, temperature=t, **how), cases, grid
    )
    assert worst <= TOLERANCE


def check_case(name, shapes, grid, count):
    draw, oracle, loss = CASES[name]
    for shape in shapes:
        rng = np.random.default_rng(shape)
        cases = []
        for _ in range(count):
            inputs = draw(rng, *shape)
            floats = [x for x in inputs if x.dtype == np.float32]
            rest = [x for x in inputs if x.dtype != np.float32]
            value = oracle(np, *(x.astype(np.float64) for x in floats), *rest)
            with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
                wide = [jnp.asarray(x, jnp.float64) for x in floats]
                dense = functools.partial(lambda rest, *x: oracle(jnp, *x, *rest), rest)
                gradients = jax.grad(dense, tuple(range(len(wide))))(*wide)
            gradients = jax.device_get(gradients)
            cases.append((inputs, (value, gradients)))
        by_temperature = name.startswith(('sup_con', 'nt_xent', 'info_nce'))
        worst = _worst(loss, cases, grid, by_temperature)
        assert worst <= TOLERANCE, f'{name} {shape}: {worst:.2g}'


def _worst(loss, cases, grid, temperature=True):
    """The largest relative error of value and embeddings' gradients over the grid.

    The gradient of a scalar (temperature, scale, bias) cancels between positives and negatives, so
    it is held to the size of its two terms instead.
    """
    worst = 0.0
    floats = tuple(i for i, x in enumerate(cases[0][0]) if x.dtype == np.float32)
    for devices, tile, exchange in grid:
        with jax.set_mesh(parallel.make_mesh(jax.devices()[:devices])):
            ours = functools.partial(loss, tile=tile, exchange=exchange)
            compiled = jax.jit(jax.value_and_grad(ours, floats))
            for inputs, (value, gradients) in cases:
                got, got_d = jax.device_get(compiled(*inputs))
                worst = max(worst, relative(got, value))
                arrays = [i for i, g in enumerate(gradients) if np.ndim(g)]
                flat = [np.concatenate([x[i].ravel() for i in arrays]) for x in (got_d, gradients)]
                worst = max(worst, relative(*flat))
                for i, g in enumerate(gradients):
                    if not np.ndim(g):
                        # d/dτ of a score is score/τ²; scales and biases are no smaller than 1.
                        tau = float(inputs[floats[i]]) if temperature else 1.0
                        size = max(1, abs(g), 1 / tau**2)
                        assert abs(got_d[i] - g) <= TOLERANCE * size
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


def test_a_pair_that_is_there_twice_costs_clip_nothing_unless_it_is_a_negative():
    """Two pairs of one text, images alike: log 2 for both, 0 where they are no negatives."""
    z = jnp.eye(3)[jnp.array([0, 0, 1])]
    texts = jnp.array([7, 7, 2])
    found = {
        same_text: float(losses.clip(z, z, 100.0, texts, same_text=same_text))
        for same_text in SAME_TEXT
    }
    assert found['negative'] == pytest.approx(2 / 3 * np.log(2), rel=1e-6)
    assert max(found['mask'], found['positive']) < 1e-6
    assert losses.clip(z, z, 100.0, record_B=texts) < 1e-6


def test_the_mean_over_equal_texts_is_what_negatives_are_anyway():
    """Why 'positive' is not UniCL's loss: equal texts have equal embeddings."""
    rng = np.random.default_rng(2)
    ids = np.array([0, 1, 1, 2, 1, 0])
    image, text = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))

    def unicl(image, text):
        logits = 5 * dense_cosine(jnp, image, text[ids])
        share = (ids[:, None] == ids[None]) / np.bincount(ids)[ids][:, None]
        each = jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits.T, 1).T
        return -jnp.sum(share * each) / 12

    def ours(image, text):
        return losses.clip(image, text[ids], 5.0)

    both = [
        jax.value_and_grad(f, (0, 1))(jnp.float32(image), jnp.float32(text)) for f in (unicl, ours)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *both)


@pytest.mark.parametrize('devices', [1, 8])
def test_equal_rows_have_equal_numbers(devices):
    rng = np.random.default_rng(0)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        for rows, length, words in ((64, 1, 9), (64, 5, 3), (128, 3, 50_000), (8, 4, 1)):
            x = rng.integers(-1, words, (rows, length)).astype(np.int32)
            x[: rows // 4] = x[rows // 2 : rows // 2 + rows // 4]
            sharded = jax.device_put(x, parallel.rows(mesh))
            got = np.asarray(jax.jit(losses.equal_rows)(sharded))
            equal = (x[:, None] == x[None]).all(-1)
            np.testing.assert_array_equal(got[:, None] == got[None], equal)


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
        (lambda: losses.clip(jnp.ones((4, 2)), jnp.ones((4, 2)), -1.0), 'logit_scale'),
        (lambda: losses.clip(jnp.eye(4), jnp.eye(4), 1.0, same_text='x'), "'mask', 'positive'"),
        (
            lambda: losses.siglip(jnp.eye(4), jnp.eye(4), 1.0, 0.0, jnp.ones(4), same_text='mask'),
            'integer labels',
        ),
        (
            lambda: losses.nt_xent(
                jnp.eye(4), jnp.eye(4), temperature=1.0, record_B=jnp.ones(3, int)
            ),
            'integer labels',
        ),
        (lambda: losses.sup_con(jnp.ones((4, 2)), jnp.ones(4, int), 0.1), r'\[B, V, D\]'),
        (lambda: losses.sup_con(jnp.ones((4, 1, 2)), jnp.ones(4), 0.1), 'integer labels'),
        (lambda: losses.sup_con(jnp.ones((4, 1, 2)), jnp.ones(4, int), 0.1, log='up'), "'in'"),
        (lambda: losses.triplet(jnp.ones((4, 2)), jnp.ones(4, int), mining='x'), 'semi_hard'),
        (lambda: losses.triplet(jnp.ones((4, 2)), jnp.ones(4, int), distance='x'), 'cosine'),
        (lambda: losses.max_margin(jnp.ones((1, 2)), jnp.ones(1, int)), 'at least two'),
        (
            lambda: losses.max_margin(jnp.ones((4, 2)), jnp.ones(4, int), map_KD=jnp.ones((2, 2))),
            'mahalanobis',
        ),
        (
            lambda: losses.nt_xent(
                jnp.ones((4, 2)), jnp.ones((4, 2)), temperature=1, exchange='mail'
            ),
            'exchange',
        ),
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
