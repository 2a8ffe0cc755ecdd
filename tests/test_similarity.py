"""The engine against dense NumPy: any score, masks, devices, tiles; and what it compiles to."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from contrastive_jax import losses, parallel, similarity
from contrastive_jax.similarity import tiles


def meshes():
    return [parallel.make_mesh(jax.devices()[:n]) for n in (1, 2, 4, 8)]


def dense_lse(scores_MN):
    top = scores_MN.max(1, keepdims=True)
    top = np.where(np.isneginf(top), 0, top)
    with np.errstate(divide='ignore'):
        return np.log(np.exp(scores_MN - top).sum(1)) + top[:, 0]


@pytest.mark.parametrize(('M', 'N', 'tile'), [(12, 20, 5), (7, 30, 1024), (33, 5, 4), (1, 1, 1)])
def test_bilinear_score_with_label_mask(M, N, tile):
    """Closed-over parameters get gradients; rows may differ from the bank; a mask by label."""
    rng = np.random.default_rng(M)
    q, k = rng.normal(size=(M, 6)), rng.normal(size=(N, 6))
    W, scale = rng.normal(size=(6, 6)), 0.3
    label_M, label_N = rng.integers(0, 3, M), rng.integers(0, 3, N)
    weight_M = rng.normal(size=M)

    def loss(q, k, W, scale):
        def score(row, bank):
            scores_mn = jnp.exp(scale) * jnp.einsum(
                'mi,ij,nj->mn', row['q'], W, bank['k'], precision=lax.Precision.HIGHEST
            )
            same_mn = row['label'][:, None] == bank['label'][None, :]
            return jnp.where(same_mn, scores_mn, -jnp.inf)

        rows = {'q': q, 'label': jnp.asarray(label_M, jnp.int32)}
        bank = {'k': k, 'label': jnp.asarray(label_N, jnp.int32)}
        lse_M = similarity.logsumexp(score, rows, bank, tile=tile)
        return jnp.sum(jnp.where(jnp.isneginf(lse_M), 0.0, lse_M) * weight_M.astype(np.float32))

    scores_MN = np.exp(scale) * q @ W @ k.T
    scores_MN = np.where(label_M[:, None] == label_N[None], scores_MN, -np.inf)
    lse_M = dense_lse(scores_MN)
    counted_M = ~np.isneginf(lse_M)
    d_scores = np.exp(scores_MN - np.where(counted_M, lse_M, 0)[:, None]) * weight_M[:, None]
    finite = np.where(np.isneginf(scores_MN), 0, scores_MN)
    expected = (
        np.exp(scale) * d_scores @ k @ W.T,
        np.exp(scale) * d_scores.T @ q @ W,
        np.exp(scale) * q.T @ d_scores @ k,
        (d_scores * finite).sum(),
    )
    arguments = [jnp.asarray(x, jnp.float32) for x in (q, k, W, scale)]
    for mesh in meshes():
        with jax.set_mesh(mesh):
            value, got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments)
        assert np.isclose(value, (lse_M[counted_M] * weight_M[counted_M]).sum(), atol=2e-5)
        for g, e in zip(got, expected, strict=True):
            assert np.abs(g - e).max() <= 2e-5 * max(1, np.abs(e).max())


def test_rows_without_any_score():
    def f(x):
        lse_M = similarity.logsumexp(
            lambda r, b: jnp.full((r.shape[0], b.shape[0]), -jnp.inf), x, x
        )
        return jnp.sum(jnp.where(jnp.isneginf(lse_M), 1.0, lse_M))

    for mesh in meshes():
        with jax.set_mesh(mesh):
            value, gradient = jax.jit(jax.value_and_grad(f))(jnp.ones((5, 2)))
        assert value == 5
        assert not np.any(gradient)


@pytest.mark.parametrize(('M', 'N', 'k', 'tile'), [(9, 50, 7, 6), (17, 3, 5, 1024), (4, 64, 64, 8)])
def test_top_k_breaks_ties_by_index_on_any_mesh(M, N, k, tile):
    """Few distinct scores, so that ties cross tiles and devices; some bank rows never count."""
    rng = np.random.default_rng(N)
    q, b = (rng.integers(0, 4, n).astype(np.float32) for n in (M, N))
    off = rng.random(N) < 0.2
    scores = np.where(off[None], -np.inf, -np.abs(q[:, None] - b[None]))
    order = np.argsort(-scores, axis=1, kind='stable')
    padded = np.full((M, k), -1)
    values = np.full((M, k), -np.inf)
    for i in range(M):
        kept = [j for j in order[i] if not off[j]][:k]
        padded[i, : len(kept)], values[i, : len(kept)] = kept, scores[i, kept]

    def score(row, bank):
        scores_mn = -jnp.abs(row[:, None] - bank['x'][None, :])
        return jnp.where(bank['off'][None, :], -jnp.inf, scores_mn)

    for mesh in meshes():
        with jax.set_mesh(mesh):
            got, where = jax.jit(lambda q, bank: similarity.top_k(score, q, bank, k, tile=tile))(
                q, {'x': b, 'off': off}
            )
        assert np.array_equal(where, padded)
        assert np.array_equal(got, values)


def dense(M, N, seed):
    """Rows and bank with a few equal labels, and the dense scores of `bilinear`."""
    rng = np.random.default_rng(seed)
    q, k, W = rng.normal(size=(M, 6)), rng.normal(size=(N, 6)), rng.normal(size=(6, 6))
    rows = {'q': jnp.asarray(q, jnp.float32), 'id': jnp.asarray(rng.integers(0, 3, M), jnp.int32)}
    bank = {'k': jnp.asarray(k, jnp.float32), 'id': jnp.asarray(rng.integers(0, 3, N), jnp.int32)}
    return rows, bank, jnp.asarray(W, jnp.float32), q @ W @ k.T


def bilinear(W):
    return lambda row, bank: jnp.einsum('mi,ij,nj->mn', row['q'], W, bank['k'], precision='highest')


EXCHANGES = [(n, exchange) for n in (2, 8) for exchange in ('ring', 'gather')] + [(1, 'auto')]


@pytest.mark.parametrize(
    ('M', 'N', 'tile', 'exchanges'), [(12, 20, 5, EXCHANGES), (33, 5, 1024, [(8, 'ring')])]
)
def test_both_directions_sum_and_count(M, N, tile, exchanges):
    """One traversal each; values and all gradients against the dense matrix."""
    rows, bank, W, scores_MN = dense(M, N, M)
    rng = np.random.default_rng(0)
    g_M, g_N = (rng.normal(size=n).astype(np.float32) for n in (M, N))
    same_MN = np.asarray(rows['id'])[:, None] == np.asarray(bank['id'])[None]

    def both(q, k, W, **how):
        over_bank, over_rows = similarity.logsumexp_both(
            bilinear(W), {**rows, 'q': q}, {**bank, 'k': k}, tile=tile, **how
        )
        return jnp.vdot(over_bank, g_M) + jnp.vdot(over_rows, g_N)

    def both_dense(q, k, W):
        s = q @ W @ k.T
        return jax.nn.logsumexp(s, 1) @ g_M + jax.nn.logsumexp(s, 0) @ g_N

    def total(q, k, W, **how):
        def term(row, bank):
            same_mn = row['id'][:, None] == bank['id'][None, :]
            return jnp.where(same_mn, jnp.tanh(bilinear(W)(row, bank)), 0.0)

        return 3 * similarity.sum(term, {**rows, 'q': q}, {**bank, 'k': k}, tile=tile, **how)

    def total_dense(q, k, W):
        return 3 * jnp.sum(jnp.where(same_MN, jnp.tanh(q @ W @ k.T), 0.0))

    def negative(row, bank):
        return (bilinear(W)(row, bank) < 0) & (row['id'][:, None] != bank['id'][None, :])

    inputs = rows['q'], bank['k'], W
    for devices, exchange in exchanges:
        how = {'exchange': exchange}
        for ours, theirs in ((both, both_dense), (total, total_dense)):
            value, gradients = jax.value_and_grad(theirs, (0, 1, 2))(*inputs)
            with jax.set_mesh(parallel.make_mesh(jax.devices()[:devices])):
                compiled = jax.jit(functools.partial(jax.value_and_grad(ours, (0, 1, 2)), **how))
                got, got_d = compiled(*inputs)
            assert np.isclose(got, value, rtol=2e-5)
            for g, e in zip(got_d, gradients, strict=True):
                assert np.abs(g - e).max() <= 2e-5 * max(1, np.abs(e).max())
        with jax.set_mesh(parallel.make_mesh(jax.devices()[:devices])):
            counted = similarity.count(negative, rows, bank, tile=tile, **how)
        assert np.array_equal(counted, ((scores_MN < 0) & ~same_MN).sum(1))


@pytest.mark.parametrize('exchange', ['ring', 'gather'])
@pytest.mark.parametrize('loss', ['nt_xent', 'info_nce', 'clip', 'siglip'])
def test_no_collective_and_no_buffer_of_batch_by_batch(loss, exchange):
    """In the compiled program of value and gradient, nothing has two batch-sized dimensions."""
    B, D, tile = 1024, 16, 32
    x = jax.ShapeDtypeStruct((B, D), jnp.float32)
    how = {'tile': tile, 'exchange': exchange}
    call = {
        'nt_xent': lambda a, b: losses.nt_xent(a, b, temperature=0.1, **how),
        'info_nce': lambda a, b: losses.info_nce(a, b, b, temperature=0.1, **how),
        'clip': lambda a, b: losses.clip(a, b, 10.0, **how),
        'siglip': lambda a, b: losses.siglip(a, b, 10.0, -10.0, **how),
    }[loss]
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        rows = parallel.rows(mesh)
        compiled = (
            jax.jit(jax.value_and_grad(call, (0, 1)), in_shardings=(rows, rows), out_shardings=None)
            .lower(x, x)
            .compile()
        )
    text = compiled.as_text()
    collectives = re.findall(
        r'= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)', text
    )
    assert collectives, 'eight devices must talk to each other'
    local = B // len(mesh.devices)
    for shapes in (text, *collectives):
        for dims in re.findall(r'\w+\[([\d,]+)\]', shapes):
            # A gathered bank's gradient on its way home has the devices and a shard: one batch.
            large = [int(d) for d in dims.split(',') if int(d) >= local]
            assert len(large) <= 1, f'a buffer of {dims} grows with the square of the batch'
    assert ('all-gather' in text) == (exchange == 'gather')
    gathered = 8 * B * D * 4 if exchange == 'gather' else 0
    spent = compiled.memory_analysis().temp_size_in_bytes
    assert spent < 2 * B * D * 4 + 64 * tile * tile * 4 + gathered


def test_large_shards_travel_in_pieces(monkeypatch):
    """The same bits as in one piece, whatever divides."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 8)), jnp.float32)

    def run():
        with jax.set_mesh(parallel.make_mesh(jax.devices()[:4])):
            return jax.jit(
                jax.value_and_grad(lambda a: losses.clip(a, a[::-1], 5.0, exchange='ring'))
            )(x)

    whole = run()
    monkeypatch.setattr(tiles, 'HOP_BYTES', 64)
    value, gradient = run()
    assert value == whole[0]
    assert np.array_equal(gradient, whole[1])


class FakeChip:
    def __init__(self, coords, core):
        self.coords, self.core_on_chip, self.platform = coords, core, 'tpu'


@pytest.mark.parametrize(
    'shape', [(2, 4, 1), (4, 4, 1), (4, 8, 1), (3, 4, 1), (2, 2, 4), (1, 1, 1)]
)
@pytest.mark.parametrize('cores', [1, 2])
def test_neighbours_on_the_mesh_share_a_link(shape, cores):
    chips = [FakeChip(at, core) for at in np.ndindex(*shape) for core in range(cores)]
    walk = parallel._ring(list(chips))
    assert len(walk) == len(chips)
    assert set(walk) == set(chips)
    for a, b in zip(walk, walk[1:] + walk[:1], strict=True):
        assert sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)) <= 1


def test_mismatched_and_empty_trees_are_named():
    with pytest.raises(ValueError, match='first dimension'):
        similarity.logsumexp(
            lambda r, b: r[0] @ b.T, (jnp.ones((3, 2)), jnp.ones(4)), jnp.ones((2, 2))
        )
    with pytest.raises(ValueError, match='not be empty'):
        similarity.logsumexp(lambda r, b: r @ b.T, jnp.ones((3, 2)), jnp.ones((0, 2)))
