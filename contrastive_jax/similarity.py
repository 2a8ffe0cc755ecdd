"""Reductions over a global score matrix that is never stored.

Every contrastive loss, and most evaluators, reduce the rows of one matrix
`scores_MN[i, j] = score(rows[i], bank[j])` between all rows and all bank rows of the global batch.
Here the matrix is visited in tiles: each device keeps its own rows and sees every shard of the
bank once, as the shards travel around the ring of devices; within a shard, tile by tile. Nothing
larger than a tile exists, forwards or backwards.

Callers write single-device mathematics. `rows` and `bank` are pytrees of arrays that lead with M
and N: whatever the score needs of an item, its embedding and its global id or label for masks.
`score(rows_block, bank_block) -> scores_mn` returns float32, −inf where a pair does not count, and
may close over values that gradients should reach (a learned scale, a bilinear W).

Under `jax.set_mesh(mesh)` the rows of both are taken as sharded over the mesh's first axis;
without a mesh everything is on one device. Sizes need not divide by devices or tiles.

M: rows, N: bank rows, m, n: a tile's.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

Tree = Any
Score = Callable[..., jax.Array]  # (rows_block, bank_block) -> scores_mn float32

TILE = 1024  # 1024 × 1024 float32 scores: 4 MiB, and large enough to keep a matrix unit busy


def logsumexp(score: Score, rows: Tree, bank: Tree, *, tile: int = TILE) -> jax.Array:
    """`log Σ_j exp score(row_i, bank_j)` for every row, differentiable.

    Args:
        score: `(rows_block, bank_block) -> scores_mn`, see the module's docstring. Closed-over
            floating-point values get gradients; ids and labels belong into rows and bank.
        rows: pytree of arrays [M, ...].
        bank: pytree of arrays [N, ...].
        tile: the largest number of rows and of bank rows scored at a time.

    Returns:
        float32 [M]; −inf (with gradient zero) for a row all of whose scores are −inf.
    """
    blocks = _abstract_block(rows, tile), _abstract_block(bank, tile)
    with _manual_mesh():
        converted, closed_over = jax.closure_convert(score, *blocks)
    return _logsumexp(converted, tile, rows, bank, tuple(map(jnp.asarray, closed_over)))


def top_k(
    score: Score, rows: Tree, bank: Tree, k: int, *, tile: int = TILE
) -> tuple[jax.Array, jax.Array]:
    """The k bank rows with the highest score for every row. Not differentiable.

    Args:
        score: as in `logsumexp`; a pair scored −inf is never among the k.
        rows: pytree of arrays [M, ...].
        bank: pytree of arrays [N, ...].
        k: how many, at least 1; may exceed N.
        tile: as in `logsumexp`.

    Returns:
        values float32 [M, k], descending, and indices int32 [M, k] into the bank. Of equal scores
        the lower index comes first, on any number of devices. Where fewer than k bank rows count,
        the rest are −inf with index −1.
    """
    return _over_devices(functools.partial(_top_k_shard, score, k, tile), rows, bank)


# --- logsumexp -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logsumexp(score: Score, tile: int, rows: Tree, bank: Tree, closed_over: tuple) -> jax.Array:
    shard = functools.partial(_logsumexp_shard, score, tile, closed_over)
    return _over_devices(shard, rows, bank)


def _logsumexp_forward(score: Score, tile: int, rows: Tree, bank: Tree, closed_over: tuple):
    lse_M = _logsumexp(score, tile, rows, bank, closed_over)
    return lse_M, (rows, bank, closed_over, lse_M)


def _logsumexp_backward(score: Score, tile: int, residuals: tuple, g_M: jax.Array):
    rows, bank, closed_over, lse_M = residuals
    shard = functools.partial(_logsumexp_shard_vjp, score, tile, closed_over)
    # Padded rows repeat the last one, but their cotangent is 0: they reach no gradient.
    d_rows, d_bank, d_closed = _over_devices(shard, (rows, lse_M), bank, cotangent_M=g_M)
    return _with_integers(d_rows, rows), _with_integers(d_bank, bank), d_closed


_logsumexp.defvjp(_logsumexp_forward, _logsumexp_backward)


def _logsumexp_shard(score: Score, tile: int, closed_over: tuple, rows: Tree, bank: Tree, ring):
    """One device's part: its rows against every shard of the bank, as a running (max, sum)."""
    row_tiles = _tiles(rows, tile)
    M = _length(rows)

    def against_tile(carry, bank_tile, row_tile):
        max_m, sum_m = carry
        scores_mn = _masked(score, closed_over)(row_tile, *bank_tile)
        new_max_m = jnp.maximum(max_m, scores_mn.max(1))
        # A finite reference, so that a row without any finite score yet stays at exp(−inf) = 0.
        reference_m = jnp.where(jnp.isneginf(new_max_m), 0.0, new_max_m)
        sum_m = sum_m * jnp.exp(max_m - reference_m)
        sum_m += jnp.exp(scores_mn - reference_m[:, None]).sum(1)
        return (new_max_m, sum_m), None

    def against_shard(carry, bank, shard):
        bank_tiles = (_tiles(bank, tile), _tiles(ring.counts(bank, shard), tile, fill=False))

        def row_step(_, xs):
            row_tile, carry = xs
            step = functools.partial(against_tile, row_tile=row_tile)
            return None, lax.scan(step, carry, bank_tiles)[0]

        return lax.scan(row_step, None, (row_tiles, carry))[1]

    shape = _tiles(jnp.zeros(M), tile).shape
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape))
    max_Tm, sum_Tm = ring.visit(against_shard, start, bank)
    return (jnp.log(sum_Tm) + jnp.where(jnp.isneginf(max_Tm), 0.0, max_Tm)).reshape(-1)[:M]


def _logsumexp_shard_vjp(
    score: Score, tile: int, closed_over: tuple, rows: Tree, bank: Tree, g_M: jax.Array, ring
) -> tuple[list, list, tuple]:
    """Recomputes the scores tile by tile; the bank's gradient travels along with its shard.

    Returns the gradients of the floating-point leaves of rows and bank, and of closed_over.
    """
    rows, lse_M = rows
    rows_float, rows_rest, merge_rows = _split(rows)
    bank_float, bank_rest, merge_bank = _split(bank)
    # Where nothing counts, lse is −inf and so is every score: keep exp(−inf − lse) at 0.
    lse_M = jnp.where(jnp.isneginf(lse_M), 0.0, lse_M)
    row_tiles = (_tiles((rows_float, rows_rest, lse_M), tile), _tiles(g_M, tile, fill=0.0))

    def against_tile(carry, bank_tile, row_tile):
        d_row_tile, d_closed = carry
        (bank_tile_float, bank_tile_rest), counts_n, d_bank_tile = bank_tile
        (row_tile_float, row_tile_rest, lse_m), g_m = row_tile

        def scores(closed_over, row_tile_float, bank_tile_float):
            row_tile = merge_rows(row_tile_float, row_tile_rest)
            bank_tile = merge_bank(bank_tile_float, bank_tile_rest)
            return _masked(score, closed_over)(row_tile, bank_tile, counts_n)

        scores_mn, pull = jax.vjp(scores, closed_over, row_tile_float, bank_tile_float)
        d_scores_mn = jnp.exp(scores_mn - lse_m[:, None]) * g_m[:, None]
        more_closed, more_row, more_bank = pull(d_scores_mn)
        carry = (_add(d_row_tile, more_row), _add(d_closed, more_closed))
        return carry, _add(d_bank_tile, more_bank)

    def against_shard(carry, travelling, shard):
        d_row_tiles, d_closed = carry
        bank, d_bank_tiles = travelling
        bank_tiles = (_tiles(bank, tile), _tiles(ring.counts(bank, shard), tile, fill=False))

        def row_step(carry, xs):
            d_bank_tiles, d_closed = carry
            row_tile, d_row_tile = xs
            step = functools.partial(against_tile, row_tile=row_tile)
            (d_row_tile, d_closed), d_bank_tiles = lax.scan(
                step, (d_row_tile, d_closed), (*bank_tiles, d_bank_tiles)
            )
            return (d_bank_tiles, d_closed), d_row_tile

        (d_bank_tiles, d_closed), d_row_tiles = lax.scan(
            row_step, (d_bank_tiles, d_closed), (row_tiles, d_row_tiles)
        )
        return (d_row_tiles, d_closed), (bank, d_bank_tiles)

    start = (_zeros(_tiles(rows_float, tile)), _zeros(closed_over))
    travelling = ((bank_float, bank_rest), _zeros(_tiles(bank_float, tile)))
    (d_row_tiles, d_closed), (_, d_bank_tiles) = ring.carry_along(against_shard, start, travelling)
    return (
        _untile(d_row_tiles, rows_float),
        _untile(d_bank_tiles, bank_float),
        _as(ring.sum(d_closed), closed_over),
    )


# --- top_k ---------------------------------------------------------------------------------------


def _top_k_shard(score: Score, k: int, tile: int, rows: Tree, bank: Tree, ring):
    """One device's part. Within a shard tiles come in order, so `lax.top_k` breaks ties rightly;
    shards come in another order on every device, so merging them compares the indices, too."""
    row_tiles = _tiles(rows, tile)
    M = _length(rows)
    none = jnp.iinfo(jnp.int32).max

    def against_tile(carry, bank_tile, row_tile):
        values_mk, indices_mk = carry
        *bank_tile, index_n = bank_tile
        scores_mn = _masked(score, ())(row_tile, *bank_tile)
        values, where = lax.top_k(scores_mn, min(k, scores_mn.shape[1]))
        values = jnp.concatenate([values_mk, values], 1)
        indices = jnp.concatenate([indices_mk, index_n[where]], 1)
        values_mk, where = lax.top_k(values, k)
        return (values_mk, jnp.take_along_axis(indices, where, 1)), None

    def empty(m: int):
        return jnp.full((m, k), -jnp.inf), jnp.full((m, k), none)

    def against_shard(carry, bank, shard):
        bank_tiles = (
            _tiles(bank, tile),
            _tiles(ring.counts(bank, shard), tile, fill=False),
            _tiles(ring.indices(bank, shard), tile),
        )

        def row_step(_, xs):
            row_tile, (values_mk, indices_mk) = xs
            step = functools.partial(against_tile, row_tile=row_tile)
            (values, indices), _ = lax.scan(step, empty(values_mk.shape[0]), bank_tiles)
            if ring.size > 1:
                values = jnp.concatenate([values_mk, values], 1)
                indices = jnp.concatenate([indices_mk, indices], 1)
                values, indices = lax.sort((-values, indices), dimension=1, num_keys=2)
                values, indices = -values[:, :k], indices[:, :k]
            return None, (values, indices)

        return lax.scan(row_step, None, (row_tiles, carry))[1]

    tiles, m = _tiles(jnp.zeros(M), tile).shape
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (tiles, *x.shape)), empty(m))
    values, indices = ring.visit(against_shard, start, bank)
    indices = jnp.where(jnp.isneginf(values), -1, indices)
    return values.reshape(-1, k)[:M], indices.reshape(-1, k)[:M]


# --- devices -------------------------------------------------------------------------------------


class _Ring:
    """Where a device stands in the ring, and the bank's way around it."""

    def __init__(self, axis: str | None, size: int, total: int):
        self.axis, self.size, self.total = axis, size, total

    def indices(self, bank: Tree, shard: jax.Array | int) -> jax.Array:
        """Global indices of the bank rows of a shard."""
        length = _length(bank)
        return shard * length + jnp.arange(length, dtype=jnp.int32)

    def counts(self, bank: Tree, shard: jax.Array | int) -> jax.Array:
        """Which bank rows of a shard are real, not padding."""
        return self.indices(bank, shard) < self.total

    def sum(self, tree: Tree) -> Tree:
        return tree if self.axis is None else lax.psum(tree, self.axis)

    def visit(self, body: Callable, carry: Tree, bank: Tree) -> Tree:
        """Folds `body(carry, bank, shard) -> carry` over all shards of the bank."""

        def step(carry, bank, shard):
            return body(carry, bank, shard), bank

        return self.carry_along(step, carry, bank)[0]

    def carry_along(self, body: Callable, carry: Tree, travelling: Tree) -> tuple[Tree, Tree]:
        """As `visit`, but `body` returns (carry, what travels on), which ends at home."""
        if self.axis is None:
            return body(carry, travelling, 0)
        here = lax.axis_index(self.axis)
        hops = [(i, (i - 1) % self.size) for i in range(self.size)]

        def step(i, state):
            carry, travelling = body(*state, (here + i) % self.size)
            return carry, jax.tree.map(lambda x: lax.ppermute(x, self.axis, hops), travelling)

        return lax.fori_loop(0, self.size, step, (carry, travelling))


def _over_devices(
    shard: Callable, rows: Tree, bank: Tree, cotangent_M: jax.Array | None = None
) -> Tree:
    """Runs `shard(rows, bank, ring)` on every device's rows and bank shard.

    Its outputs lead with M. With a cotangent it is `shard(rows, bank, cotangent, ring)`, and the
    outputs are three: trees that lead with M, with N, and replicated values. Rows and bank are
    padded to a multiple of the devices, and the outputs cut back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = _devices()
    M, N = _length(rows), _length(bank)
    gradient = cotangent_M is not None
    cotangent = [cotangent_M] if gradient else []
    if size == 1:
        return shard(rows, bank, *cotangent, _Ring(None, 1, N))
    axis = mesh.axis_names[0]
    split = PartitionSpec(axis)

    def local(rows: Tree, bank: Tree, cotangent: list):
        return shard(rows, bank, *cotangent, _Ring(axis, size, N))

    run = jax.shard_map(
        local,
        in_specs=(split, split, split),
        out_specs=(split, split, PartitionSpec()) if gradient else split,
        check_vma=False,
    )
    out = run(_pad(rows, -M % size), _pad(bank, -N % size), _pad(cotangent, -M % size, fill=0.0))
    if not gradient:
        return _cut(out, M)
    return _cut(out[0], M), _cut(out[1], N), out[2]


def _devices() -> int:
    """How many devices rows are sharded over: the size of the current mesh's first axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[mesh.axis_names[0]]


def _manual_mesh():
    """The context that `shard_map` runs its function in, to trace a score for use inside it."""
    mesh = jax.sharding.get_abstract_mesh()
    if _devices() == 1:
        return contextlib.nullcontext()
    manual = {axis: AxisType.Manual for axis in mesh.axis_names}
    return jax.sharding.use_abstract_mesh(mesh.update_axis_types(manual))


# --- trees of blocks -----------------------------------------------------------------------------


def _length(tree: Tree) -> int:
    lengths = {x.shape[0] for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            'similarity: the arrays of rows (and of bank) must agree in their first dimension '
            f'and not be empty, got lengths {sorted(lengths)}'
        )
    return lengths.pop()


def _tiling(length: int, tile: int) -> tuple[int, int]:
    """(how many tiles, of which size): the fewest, and of those the smallest."""
    count = -(-length // tile)
    return count, -(-length // count)


def _pad(tree: Tree, by: int, fill: float | bool | None = None) -> Tree:
    """Appends `by` rows: `fill`, or copies of the last row, on which any score is well-behaved."""

    def pad(x: jax.Array) -> jax.Array:
        width = [(0, by)] + [(0, 0)] * (x.ndim - 1)
        if fill is None:
            return jnp.pad(x, width, mode='edge')
        return jnp.pad(x, width, constant_values=fill)

    return jax.tree.map(pad, tree) if by else tree


def _cut(tree: Tree, length: int) -> Tree:
    return jax.tree.map(lambda x: x if x.shape[0] == length else x[:length], tree)


def _tiles(tree: Tree, tile: int, fill: float | bool | None = None) -> Tree:
    """[length, ...] -> [tiles, tile size, ...], padded as `_pad` does."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return tree
    length = leaves[0].shape[0]
    count, size = _tiling(length, tile)
    padded = _pad(tree, count * size - length, fill)
    return jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), padded)


def _untile(tiles: Tree, like: Tree) -> Tree:
    """[tiles, tile size, ...] -> `like`'s shapes and dtypes."""
    flat = jax.tree.map(lambda t, x: t.reshape(-1, *x.shape[1:])[: x.shape[0]], tiles, like)
    return _as(flat, like)


def _abstract_block(tree: Tree, tile: int) -> Tree:
    """The shapes and dtypes of one tile of one device's rows."""
    _, size = _tiling(-(-_length(tree) // _devices()), tile)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), tree)


def _masked(score: Score, closed_over: tuple) -> Score:
    """The score as float32, −inf for bank rows that are padding."""

    def masked(row_tile: Tree, bank_tile: Tree, counts_n: jax.Array) -> jax.Array:
        scores_mn = score(row_tile, bank_tile, *closed_over).astype(jnp.float32)
        return jnp.where(counts_n[None, :], scores_mn, -jnp.inf)

    return masked


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _split(tree: Tree) -> tuple[list, list, Callable[[list, list], Tree]]:
    """(floating-point leaves, the others, a function that puts such lists together again)."""
    leaves, structure = jax.tree.flatten(tree)
    floats = [_is_float(x) for x in leaves]

    def merge(some: list, others: list) -> Tree:
        some_iter, others_iter = iter(some), iter(others)
        return structure.unflatten([next(some_iter if f else others_iter) for f in floats])

    def pick(wanted: bool) -> list:
        return [x for x, f in zip(leaves, floats, strict=True) if f is wanted]

    return pick(True), pick(False), merge


def _with_integers(gradients: list, tree: Tree) -> Tree:
    """Gradients of `tree`'s floating-point leaves, and the float0 that JAX wants for the others."""
    _, others, merge = _split(tree)
    return merge(gradients, [np.zeros(x.shape, jax.dtypes.float0) for x in others])


def _zeros(tree: Tree) -> Tree:
    """Accumulators: float32 (or wider), whatever the dtype of the values."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)


def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, more)


def _as(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
