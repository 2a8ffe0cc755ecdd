"""Cuts a matrix of pair scores into tiles and shards and visits them, for `similarity`.

M: rows, N: bank rows, m, n: a tile's.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from contrastive_jax.similarity import trees
from contrastive_jax.similarity.mesh import axis, device_count, on_cpus

Tree = Any
Score = Callable[..., jax.Array]  # (rows_block, bank_block) -> scores_mn

# With 'auto', a bank that takes this much as float32 on every device is gathered: one collective
# instead of one a device. On CPUs any bank is: docs/troubleshooting.md.
GATHERED_BYTES = 4 * 2**20
HOP_BYTES = 16 * 2**20  # that a device sends to its neighbour at a time
EXCHANGES = ('auto', 'ring', 'gather')
STRIP = 2**22  # scores that `strips` holds at a time


class Block(NamedTuple):
    """Items, their global indices, and which of them are real, not padding."""

    x: Tree
    index: jax.Array
    counts: jax.Array


class Layout(NamedTuple):
    """The cuts of a matrix of M × N scores over devices and into tiles."""

    M: int
    N: int
    devices: int
    gather: bool
    row_tiles: tuple[int, int]  # of a device's rows: how many, of which size
    bank_tiles: tuple[int, int]  # of a shard, or where it is gathered of the whole bank

    @classmethod
    def of(cls, rows: Tree, bank: Tree, tile: int, exchange: str) -> 'Layout':
        if exchange not in EXCHANGES:
            raise ValueError(f'similarity: exchange must be one of {EXCHANGES}, got {exchange!r}')
        M, N, devices = trees.length(rows), trees.length(bank), device_count()
        small = 4 * trees.floats(bank) <= GATHERED_BYTES or on_cpus()
        gather = exchange == 'gather' or (exchange == 'auto' and small)
        gather = gather and devices > 1
        shard = N if gather else -(-N // devices)
        return cls(
            M, N, devices, gather, trees.tiling(-(-M // devices), tile), trees.tiling(shard, tile)
        )

    def run(
        self,
        body: Callable,
        rows: Tree,
        bank: Tree,
        start: Callable[[], tuple],
        join: Callable[[Tree], Tree] | None = None,
        *,
        symmetric: bool = False,
    ) -> tuple[Tree, Tree, Tree]:
        """Folds body over all tiles of the matrix.

        Args:
            body: `(row_block, bank_block, row_carry, bank_carry, shared) -> the last three`, the
                carries those of the blocks' items.
            rows: pytree of arrays [M, ...].
            bank: pytree of arrays [N, ...].
            start: the three at the start: leading with `row_tiles`, with `bank_tiles`, and any
                shape. A device's shared value is its own; at the end they are added up.
            join: a carry of the bank with a leading dimension of devices -> without; adds unless
                it is given.
            symmetric: rows and bank are the same items, and start has nothing, (), for the bank.
                One device then meets a pair of different tiles once, where body's carry of the
                bank block is what the rows have; it is () where the pair is met from the other
                side, too.

        Returns:
            The carries [M, ...] and [N, ...], and the shared value.
        """
        if self.devices == 1:
            return self._local(body, rows, bank, start, join, symmetric)
        split = PartitionSpec(axis())
        local = jax.shard_map(
            lambda rows, bank: self._local(body, rows, bank, start, join, symmetric),
            in_specs=(split, split),
            out_specs=(split, split, PartitionSpec()),
            check_vma=False,
        )
        padded = trees.pad(rows, -self.M % self.devices), trees.pad(bank, -self.N % self.devices)
        row_carry, bank_carry, shared = local(*padded)
        return trees.cut(row_carry, self.M), trees.cut(bank_carry, self.N), shared

    def _local(
        self,
        body: Callable,
        rows: Tree,
        bank: Tree,
        start: Callable,
        join: Callable | None,
        symmetric: bool,
    ) -> tuple[Tree, Tree, Tree]:
        """One device's part of `run`."""
        here = 0 if self.devices == 1 else lax.axis_index(axis())
        row_length, bank_length = trees.length(rows), trees.length(bank)
        row_blocks = self._blocks(rows, here * row_length, self.M, self.row_tiles)
        if symmetric and self.devices == 1:
            # On several devices, what was accumulated for a shard would have to travel with it: as
            # float32 that is more than the gradient itself, which is what memory there is for.
            row_carry, bank_carry, shared = _half_sweep(body, row_blocks, start())
        elif self.devices == 1 or self.gather:
            if self.gather:
                bank = jax.tree.map(lambda x: lax.all_gather(x, axis(), tiled=True), bank)
            bank_blocks = self._blocks(trees.cut(bank, self.N), 0, self.N, self.bank_tiles)
            row_carry, bank_carry, shared = _sweep(body, row_blocks, bank_blocks, start())
            bank_carry = trees.untile(bank_carry, self.N)
            if self.gather:
                bank_carry = trees.pad(bank_carry, bank_length * self.devices - self.N)
                bank_carry = jax.tree.map(self._home, bank_carry)
                added = functools.partial(jax.tree.map, lambda x: x.sum(0))
                bank_carry = (join or added)(bank_carry)
        else:

            def step(i: jax.Array, state: tuple) -> tuple:
                bank, carries = state
                shard = (here + i) % self.devices
                blocks = self._blocks(bank, shard * bank_length, self.N, self.bank_tiles)
                row_carry, bank_carry, shared = _sweep(body, row_blocks, blocks, carries)
                # What was accumulated for a shard goes along: after `devices` hops both are home.
                bank, bank_carry = jax.tree.map(self._hop, (bank, bank_carry))
                return bank, (row_carry, bank_carry, shared)

            _, (row_carry, bank_carry, shared) = lax.fori_loop(
                0, self.devices, step, (bank, start())
            )
            bank_carry = trees.untile(bank_carry, bank_length)
        if self.devices > 1:
            shared = lax.psum(shared, axis())
        return trees.untile(row_carry, row_length), bank_carry, shared

    def _hop(self, x: jax.Array) -> jax.Array:
        """Device i hands x to i − 1; what is large, piece by piece, so that only a piece waits."""
        hops = [(i, (i - 1) % self.devices) for i in range(self.devices)]
        wanted = min(-(-x.size * x.dtype.itemsize // HOP_BYTES), x.shape[0])
        pieces = next(n for n in range(wanted, x.shape[0] + 1) if x.shape[0] % n == 0)
        if pieces > 8 * wanted:  # a length that hardly divides
            pieces = 1

        def piece(i: jax.Array, x: jax.Array) -> jax.Array:
            arrived = lax.ppermute(x[i], axis(), hops)
            return lax.dynamic_update_index_in_dim(x, arrived, i, 0)

        if pieces == 1:
            return lax.ppermute(x, axis(), hops)
        split = x.reshape(pieces, -1, *x.shape[1:])
        return lax.fori_loop(0, pieces, piece, split).reshape(x.shape)

    def _home(self, x: jax.Array) -> jax.Array:
        """[N padded, ...] on every device -> [devices, shard, ...]: all that is said of a shard."""
        return lax.all_to_all(
            x.reshape(self.devices, -1, *x.shape[1:]), axis(), split_axis=0, concat_axis=0
        )

    @staticmethod
    def _blocks(x: Tree, first: Any, total: int, tiles: tuple[int, int]) -> Block:
        index = first + jnp.arange(trees.length(x), dtype=jnp.int32)
        counts = trees.tile_up(index < total, tiles, fill=False)
        return Block(trees.tile_up(x, tiles), trees.tile_up(index, tiles), counts)


def _at(tree: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Tree, tile: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda x, t: lax.dynamic_update_index_in_dim(x, t, i, 0), tree, tile)


def _sweep(body: Callable, rows: Block, bank: Block, carries: tuple) -> tuple:
    """Folds body over all pairs of tiles; carries are updated in place."""

    def row_step(i: jax.Array, carries: tuple) -> tuple:
        row_carry, bank_carry, shared = carries
        row = _at(rows, i)

        def bank_step(j: jax.Array, carries: tuple) -> tuple:
            mine, bank_carry, shared = carries
            mine, theirs, shared = body(row, _at(bank, j), mine, _at(bank_carry, j), shared)
            return mine, _put(bank_carry, theirs, j), shared

        start = _at(row_carry, i), bank_carry, shared
        mine, bank_carry, shared = lax.fori_loop(0, bank.index.shape[0], bank_step, start)
        return _put(row_carry, mine, i), bank_carry, shared

    return lax.fori_loop(0, rows.index.shape[0], row_step, carries)


def _half_sweep(body: Callable, blocks: Block, carries: tuple) -> tuple:
    """Folds body over all tiles with themselves, and once over all pairs of different ones.

    Tile i meets the (T − 1) / 2 that follow it, around the circle of T. Where T is even, half of
    the tiles also meet the one across. Loops have fixed lengths, so that `hlo` can count them.
    """
    T = blocks.index.shape[0]

    def meet(i: Any, j: Any, carry: Tree, mine: Tree, shared: Tree) -> tuple:
        mine, theirs, shared = body(_at(blocks, i), _at(blocks, j), mine, _at(carry, j), shared)
        return _put(carry, theirs, j), mine, shared

    def row_step(i: jax.Array, state: tuple) -> tuple:
        carry, shared = state
        row = _at(blocks, i)
        mine, _, shared = body(row, row, _at(carry, i), (), shared)
        carry, mine, shared = lax.fori_loop(
            1, (T + 1) // 2, lambda k, s: meet(i, (i + k) % T, *s), (carry, mine, shared)
        )
        return _put(carry, mine, i), shared

    def across(i: jax.Array, state: tuple) -> tuple:
        carry, shared = state
        carry, mine, shared = meet(i, i + T // 2, carry, _at(carry, i), shared)
        return _put(carry, mine, i), shared

    carry, nothing, shared = carries
    state = lax.fori_loop(0, T, row_step, (carry, shared))
    carry, shared = state if T % 2 else lax.fori_loop(0, T // 2, across, state)
    return carry, nothing, shared


def gradients(
    score: Score,
    layout: 'Layout',
    weigh: Callable[[jax.Array, tuple, tuple], jax.Array],
    rows_side: tuple,
    bank_side: tuple,
    closed_over: tuple,
    *,
    symmetric: bool = False,
) -> tuple[Any, list, list, tuple]:
    """Pulls a weight for every score back to rows, bank and closed-over values, tile by tile.

    Args:
        score: of a pair.
        layout: of the matrix.
        weigh: `(scores_mn, rest of row_side, rest of bank_side) -> d loss / d scores_mn`. For a
            `sum` scores are terms.
        rows_side: (rows, what else weigh needs of them).
        bank_side: (bank, what else weigh needs of it).
        closed_over: what the score closes over.
        symmetric: rows and bank are the same items, the weights hold both of a pair's, and the
            gradients of the items are the rows'.

    Returns:
        The rows' sums of scores (() unless the bank side is bare), the gradients of the
        floating-point leaves of rows and bank, and of closed_over.
    """
    summing = len(bank_side) == len(rows_side) == 1

    def body(row, bank, row_carry: tuple, bank_carry: tuple, shared: tuple):
        (row_x, *row_rest), (bank_x, *bank_rest) = row.x, bank.x
        row_floats, row_others, merge_row = trees.split(trees.wide(row_x))
        bank_floats, bank_others, merge_bank = trees.split(trees.wide(bank_x))

        def scores(closed_over: tuple, row_floats: list, bank_floats: list) -> jax.Array:
            return masked(score, closed_over, 0.0 if summing else -jnp.inf)(
                row._replace(x=merge_row(row_floats, row_others)),
                bank._replace(x=merge_bank(bank_floats, bank_others)),
            )

        # Of a pair that is met from both sides, each side gets its own gradient.
        one_sided = symmetric and not bank_carry
        if one_sided:
            primals = closed_over, row_floats
            scores_mn, pull = jax.vjp(lambda c, r: scores(c, r, bank_floats), *primals)
        else:
            scores_mn, pull = jax.vjp(scores, closed_over, row_floats, bank_floats)
        weights_mn = weigh(scores_mn, tuple(row_rest), tuple(bank_rest))
        more_closed, more_row, *more_bank = pull(weights_mn)
        if one_sided:
            more_closed = jax.tree.map(lambda x: x / 2, more_closed)
        d_row, *sum_m = row_carry
        row_carry = trees.add(d_row, more_row), *(x + scores_mn.sum(1) for x in sum_m)
        if bank_carry:
            bank_carry = trees.add(bank_carry[0], more_bank[0]), *bank_carry[1:]
        return row_carry, bank_carry, trees.add(shared, more_closed)

    rows, bank = trees.split(rows_side[0])[0], trees.split(bank_side[0])[0]

    def start() -> tuple:
        def zeros(leaves: list, tiles: tuple[int, int]) -> list:
            return [jnp.zeros((*tiles, *x.shape[1:]), trees.wide(x.dtype)) for x in leaves]

        sums = [jnp.zeros(layout.row_tiles)] if summing else []
        d_bank = () if symmetric else (zeros(bank, layout.bank_tiles),)
        d_closed = jax.tree.map(lambda x: jnp.zeros(x.shape, trees.wide(x.dtype)), closed_over)
        return (zeros(rows, layout.row_tiles), *sums), d_bank, d_closed

    (d_rows, *sums), d_bank, d_closed = layout.run(
        body, rows_side, bank_side, start, symmetric=symmetric
    )
    d_bank = [] if symmetric else trees.as_types(d_bank[0], bank)
    return (
        sums[0] if summing else (),
        trees.as_types(d_rows, rows),
        d_bank,
        trees.as_types(d_closed, closed_over),
    )


def strips(function: Callable[[Tree, Tree], Tree], rows: Tree, bank: Tree) -> Tree:
    """`function(rows_block, bank) -> tree of [m, ...]` for all rows, differentiable.

    For reductions that need all of a row's scores at once (order statistics): every device gathers
    the whole bank and takes as many rows at a time as have `STRIP` scores.

    Args:
        function: of a block of rows and the whole bank, [N, ...]; may close over values that
            gradients should reach.
        rows: pytree of arrays [M, ...].
        bank: pytree of arrays [N, ...].

    Returns:
        The trees of all blocks as one, leading with M.
    """
    M, N, devices = trees.length(rows), trees.length(bank), device_count()
    shape = trees.tiling(-(-M // devices), max(1, STRIP // N))
    function, closed_over = _convert(
        function, trees.abstract(rows, shape[1]), trees.abstract(bank, N)
    )

    def local(rows: Tree, bank: Tree, closed_over: tuple) -> Tree:
        if devices > 1:
            bank = jax.tree.map(lambda x: lax.all_gather(x, axis(), tiled=True), bank)
        bank = trees.wide(trees.cut(bank, N))
        mine = trees.length(rows)
        block = jax.checkpoint(lambda row_tile: function(trees.wide(row_tile), bank, *closed_over))
        out = lax.map(block, trees.tile_up(rows, shape))
        return trees.untile(out, mine)

    if devices == 1:
        return local(rows, bank, closed_over)
    split = PartitionSpec(axis())
    run = jax.shard_map(
        local, in_specs=(split, split, PartitionSpec()), out_specs=split, check_vma=False
    )
    return trees.cut(
        run(trees.pad(rows, -M % devices), trees.pad(bank, -N % devices), closed_over), M
    )


def _manual_mesh():
    """The context that `shard_map` runs its function in, to trace a score for use inside it."""
    mesh = jax.sharding.get_abstract_mesh()
    if device_count() == 1:
        return contextlib.nullcontext()
    manual = {axis: AxisType.Manual for axis in mesh.axis_names}
    return jax.sharding.use_abstract_mesh(mesh.update_axis_types(manual))


def convert(score: Score, layout: Layout, rows: Tree, bank: Tree) -> tuple[Score, tuple]:
    """The score as a function of its closed-over floating-point values, too; and those."""
    return _convert(
        score, trees.abstract(rows, layout.row_tiles[1]), trees.abstract(bank, layout.bank_tiles[1])
    )


def _convert(function: Callable, *blocks: Tree) -> tuple[Callable, tuple]:
    with _manual_mesh():
        converted, closed_over = jax.closure_convert(function, *blocks)
    return converted, tuple(map(jnp.asarray, closed_over))


def masked(score: Score, closed_over: tuple = (), fill: float = -math.inf) -> Callable:
    """The score of two blocks as float32, `fill` where either item is padding."""

    def masked(row: Block, bank: Block) -> jax.Array:
        scores_mn = score(trees.wide(row.x), trees.wide(bank.x), *closed_over)
        counts_mn = row.counts[:, None] & bank.counts[None, :]
        return jnp.where(counts_mn, trees.wide(scores_mn), fill)

    return masked
