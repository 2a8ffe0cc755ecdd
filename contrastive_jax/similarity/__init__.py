"""Reductions over a global score matrix that is never stored.

Every contrastive loss, and most evaluators, reduce one matrix
`scores_MN[i, j] = score(rows[i], bank[j])` between all rows and all bank rows of the global batch.
Here the matrix is visited in tiles. Each device keeps its own rows and meets every shard of the
bank, either as the shards travel around the ring of devices (nothing larger than a shard is ever
held) or, where the whole bank is small, after one all-gather. Gradients recompute the tiles.

| reduction | result | gradient | matrix products of M·N·D, with gradient |
|---|---|---|---|
| `logsumexp` | [M] | yes | 4 |
| `logsumexp_both`: over the bank and over the rows | [M], [N] | yes | 4 |
| `logsumexp_symmetric`: of items among themselves | [M] | yes | 3, on one device 2 |
| `sum` of a pairwise term | scalar | yes | 3 |
| `count` of pairs for which a predicate holds | [M] | no | 1 |
| `top_k` | [M, k] twice | no | 1 |
| `tiles.strips`: any function of a row and the whole bank | [M, ...] | yes | 4 |

Callers write single-device mathematics. `rows` and `bank` are pytrees of arrays that lead with M
and N: whatever the score needs of an item, its embedding and its global id or label for masks.
`score(rows_block, bank_block) -> scores_mn` is given floating-point leaves as float32 whatever
their dtype, returns −inf where a pair does not count, and may close over values that gradients
should reach (a learned scale, a bilinear W).

Under `jax.set_mesh(mesh)` the rows of both are taken as sharded over the mesh's first axis;
without a mesh everything is on one device. Sizes need not divide by devices or tiles.

M: rows, N: bank rows, m, n: a tile's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.similarity import tiles, trees

Tree = Any
Score = Callable[..., jax.Array]  # (rows_block, bank_block) -> scores_mn

TILE = 1024  # 1024 × 1024 float32 scores: 4 MiB, and large enough to keep a matrix unit busy


def logsumexp(
    score: Score, rows: Tree, bank: Tree, *, tile: int = TILE, exchange: str = 'auto'
) -> jax.Array:
    """`log Σ_j exp score(row_i, bank_j)` for every row, differentiable.

    Args:
        score: `(rows_block, bank_block) -> scores_mn`, see the module's docstring. Closed-over
            floating-point values get gradients; ids and labels belong into rows and bank.
        rows: pytree of arrays [M, ...].
        bank: pytree of arrays [N, ...].
        tile: the largest number of rows and of bank rows scored at a time.
        exchange: how devices meet the other devices' bank rows: 'ring', 'gather', or 'auto',
            which gathers what is small.

    Returns:
        float32 [M]; −inf (with gradient zero) for a row all of whose scores are −inf.

    Raises:
        ValueError: arrays whose first dimensions differ or are 0; an unknown exchange.
    """
    return _lse('rows', score, rows, bank, tile, exchange)[0]


def logsumexp_both(
    score: Score, rows: Tree, bank: Tree, *, tile: int = TILE, exchange: str = 'auto'
) -> tuple[jax.Array, jax.Array]:
    """`logsumexp` over the bank for every row and over the rows for every bank row, in one pass.

    Arguments as in `logsumexp`.

    Returns:
        float32 [M] and [N].
    """
    return _lse('both', score, rows, bank, tile, exchange)


def logsumexp_symmetric(
    score: Score, items: Tree, *, tile: int = TILE, exchange: str = 'auto'
) -> jax.Array:
    """`logsumexp` of items against themselves, for a score with score(a, b) = score(b, a).

    The gradient of an item as a bank row is that of a row, with the two's weights exchanged, so
    one product gives both and nothing but the bank travels. One device visits half of the matrix.
    Masks must be symmetric, too.

    Arguments as in `logsumexp`.

    Returns:
        float32 [M].
    """
    return _lse('symmetric', score, items, items, tile, exchange)[0]


def sum(
    term: Score, rows: Tree, bank: Tree, *, tile: int = TILE, exchange: str = 'auto'
) -> jax.Array:
    """`Σ_ij term(row_i, bank_j)`, differentiable; its gradient is found in the same pass.

    Arguments as in `logsumexp`; the term is finite, and 0 where a pair does not count. What the sum
    is divided by belongs into the term: gradients take their arrays' dtype before they are scaled.

    Returns:
        float32 scalar.
    """
    layout = tiles.Layout.of(rows, bank, tile, exchange)
    converted, closed_over = tiles.convert(term, layout, rows, bank)
    return _sum(converted, layout, rows, bank, closed_over)


def count(
    predicate: Score, rows: Tree, bank: Tree, *, tile: int = TILE, exchange: str = 'auto'
) -> jax.Array:
    """For how many bank rows `predicate(rows_block, bank_block) -> bool_mn` holds. No gradient.

    Counts the items of a label, or the rank of a positive: rows carry its score, the predicate
    asks which scores are higher.

    Arguments as in `logsumexp`.

    Returns:
        int32 [M].
    """
    layout = tiles.Layout.of(rows, bank, tile, exchange)

    def body(row, bank, carry: jax.Array, *rest):
        holds_mn = predicate(trees.wide(row.x), trees.wide(bank.x)) & bank.counts[None, :]
        return carry + holds_mn.sum(1, dtype=jnp.int32), *rest

    start = functools.partial(jnp.zeros, layout.row_tiles, jnp.int32)
    return layout.run(body, rows, bank, lambda: (start(), (), ()))[0]


def top_k(
    score: Score, rows: Tree, bank: Tree, k: int, *, tile: int = TILE, exchange: str = 'auto'
) -> tuple[jax.Array, jax.Array]:
    """The k bank rows with the highest score for every row. Not differentiable.

    Args:
        score: as in `logsumexp`; a pair scored −inf is never among the k.
        rows: pytree of arrays [M, ...].
        bank: pytree of arrays [N, ...].
        k: how many, at least 1; may exceed N.
        tile: as in `logsumexp`.
        exchange: as in `logsumexp`.

    Returns:
        values float32 [M, k], descending, and indices int32 [M, k] into the bank. Of equal scores
        the lower index comes first, on any number of devices. Where fewer than k bank rows count,
        the rest are −inf with index −1.
    """
    layout = tiles.Layout.of(rows, bank, tile, exchange)

    def body(row, bank, carry: tuple[jax.Array, jax.Array], *rest):
        scores_mn = tiles.masked(score)(row, bank)
        # Within a tile `lax.top_k` prefers the lower index; shards come in another order on every
        # device, so merging compares the indices, too.
        values, where = lax.top_k(scores_mn, min(k, scores_mn.shape[1]))
        values = jnp.concatenate([carry[0], values], 1)
        indices = jnp.concatenate([carry[1], bank.index[where]], 1)
        values, indices = lax.sort((-values, indices), dimension=1, num_keys=2)
        return (-values[:, :k], indices[:, :k]), *rest

    def start() -> tuple:
        shape = (*layout.row_tiles, k)
        none = jnp.full(shape, jnp.iinfo(jnp.int32).max)
        return (jnp.full(shape, -jnp.inf), none), (), ()

    values, indices = layout.run(body, rows, bank, start)[0]
    return values, jnp.where(jnp.isneginf(values), -1, indices)


# --- logsumexp -----------------------------------------------------------------------------------


def _lse(mode: str, score: Score, rows: Tree, bank: Tree, tile: int, exchange: str) -> tuple:
    layout = tiles.Layout.of(rows, bank, tile, exchange)
    converted, closed_over = tiles.convert(score, layout, rows, bank)
    bank = () if mode == 'symmetric' else bank
    return _logsumexp(mode, converted, layout, rows, bank, closed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _logsumexp(
    mode: str, score: Score, layout: tiles.Layout, rows: Tree, bank: Tree, closed_over: tuple
) -> tuple[jax.Array, ...]:
    """([M],) or with mode 'both' ([M], [N]), as running (maximum, sum)."""

    def body(row, bank, row_carry: tuple, bank_carry: tuple, shared: tuple):
        scores_mn = tiles.masked(score, closed_over)(row, bank)
        row_carry = _more(row_carry, scores_mn, 1)
        if bank_carry:
            bank_carry = _more(bank_carry, scores_mn, 0)
        return row_carry, bank_carry, shared

    def nothing(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        return jnp.full(shape, -jnp.inf), jnp.zeros(shape)

    def start() -> tuple:
        over_rows = nothing(layout.bank_tiles) if mode == 'both' else ()
        return nothing(layout.row_tiles), over_rows, ()

    symmetric = mode == 'symmetric'
    bank = rows if symmetric else bank
    join = _joined if mode == 'both' else None
    over_bank, over_rows, _ = layout.run(body, rows, bank, start, join, symmetric=symmetric)
    lse = [over_bank, over_rows] if mode == 'both' else [over_bank]
    return tuple(jnp.log(total) + _finite(top) for top, total in lse)


def _logsumexp_forward(mode: str, score: Score, layout: tiles.Layout, *inputs):
    lse = _logsumexp(mode, score, layout, *inputs)
    return lse, (*inputs, lse)


def _logsumexp_backward(mode: str, score: Score, layout: tiles.Layout, residuals: tuple, g: tuple):
    rows, bank, closed_over, lse = residuals
    symmetric = mode == 'symmetric'
    # Where nothing counts, lse is −inf and so is every score: keep exp(−inf − lse) at 0.
    lse = [jnp.where(jnp.isneginf(x), 0.0, x) for x in lse]
    rows_side = (rows, lse[0], g[0])
    bank_side = {'rows': (bank,), 'both': (bank, lse[-1], g[-1]), 'symmetric': rows_side}[mode]

    def weigh(scores_mn: jax.Array, row_side: tuple, bank_side: tuple) -> jax.Array:
        lse_m, g_m = row_side
        weights_mn = jnp.exp(scores_mn - lse_m[:, None]) * g_m[:, None]
        if bank_side:
            lse_n, g_n = bank_side
            weights_mn += jnp.exp(scores_mn - lse_n[None, :]) * g_n[None, :]
        return weights_mn

    _, d_rows, d_bank, d_closed = tiles.gradients(
        score, layout, weigh, rows_side, bank_side, closed_over, symmetric=symmetric
    )
    d_bank = () if symmetric else trees.with_integers(d_bank, bank)
    return trees.with_integers(d_rows, rows), d_bank, d_closed


_logsumexp.defvjp(_logsumexp_forward, _logsumexp_backward)


def _more(carry: tuple, scores_mn: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """A running (maximum, Σ exp(score − maximum)) and the scores along an axis, together."""
    top, total = carry
    new_top = jnp.maximum(top, scores_mn.max(axis))
    # A finite reference, so that a row without any finite score yet stays at exp(−inf) = 0.
    reference = _finite(new_top)
    more = jnp.exp(scores_mn - jnp.expand_dims(reference, axis)).sum(axis)
    return new_top, total * jnp.exp(top - reference) + more


def _joined(carry: tuple) -> tuple[jax.Array, jax.Array]:
    """Running (maximum, sum) of several devices, [devices, n] each, as one."""
    top, total = carry
    new_top = top.max(0)
    return new_top, (total * jnp.exp(top - _finite(new_top)[None])).sum(0)


def _finite(top: jax.Array) -> jax.Array:
    return jnp.where(jnp.isneginf(top), 0.0, top)


# --- sum -----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(
    term: Score, layout: tiles.Layout, rows: Tree, bank: Tree, closed_over: tuple
) -> jax.Array:
    def body(row, bank, row_carry: jax.Array, *rest):
        return row_carry + tiles.masked(term, closed_over, 0.0)(row, bank).sum(1), *rest

    sum_M, _, _ = layout.run(body, rows, bank, lambda: (jnp.zeros(layout.row_tiles), (), ()))
    return jnp.sum(sum_M)


def _sum_forward(term: Score, layout: tiles.Layout, rows: Tree, bank: Tree, closed_over: tuple):
    # The weight of every term is known before the sum is: the gradient needs no second pass.
    sum_M, *gradients = tiles.gradients(
        term, layout, lambda scores_mn, *_: jnp.ones_like(scores_mn), (rows,), (bank,), closed_over
    )
    return jnp.sum(sum_M), (gradients, rows, bank)


def _sum_backward(term: Score, layout: tiles.Layout, residuals: tuple, g: jax.Array):
    del term, layout
    gradients, rows, bank = residuals
    scale = functools.partial(jax.tree.map, lambda d: (g * d.astype(g.dtype)).astype(d.dtype))
    d_rows, d_bank, d_closed = map(scale, gradients)
    return trees.with_integers(d_rows, rows), trees.with_integers(d_bank, bank), d_closed


_sum.defvjp(_sum_forward, _sum_backward)
