"""Pytrees of arrays that lead with rows: cut, padded, tiled; floats apart from the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def length(tree: Tree) -> int:
    """The number of rows; a ValueError where arrays disagree, or have none."""
    lengths = {x.shape[0] for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            'similarity: the arrays of rows (and of bank) must agree in their first dimension '
            f'and not be empty, got lengths {sorted(lengths)}'
        )
    return lengths.pop()


def tiling(total: int, tile: int) -> tuple[int, int]:
    """(how many tiles, of which size): the fewest, and of those the smallest."""
    count = -(-total // tile)
    return count, -(-total // count)


def pad(tree: Tree, by: int, fill: float | bool | None = None) -> Tree:
    """Appends `by` rows: `fill`, or copies of the last row, on which any score is well-behaved."""

    def pad(x: jax.Array) -> jax.Array:
        width = [(0, by)] + [(0, 0)] * (x.ndim - 1)
        if fill is None:
            return jnp.pad(x, width, mode='edge')
        return jnp.pad(x, width, constant_values=fill)

    return jax.tree.map(pad, tree) if by else tree


def cut(tree: Tree, length: int) -> Tree:
    return jax.tree.map(lambda x: x if x.shape[0] == length else x[:length], tree)


def tile_up(tree: Tree, tiles: tuple[int, int], fill: float | bool | None = None) -> Tree:
    """[length, ...] -> [tiles, tile size, ...], padded as `pad` does."""
    count, size = tiles

    def cut(x: jax.Array) -> jax.Array:
        return pad(x, count * size - x.shape[0], fill).reshape(count, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def untile(tiles: Tree, length: int) -> Tree:
    """[tiles, tile size, ...] -> [length, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tiles)


def abstract(tree: Tree, length: int) -> Tree:
    """The shapes and dtypes in which a score sees `length` items."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((length, *x.shape[1:]), wide(x.dtype)), tree)


def floats(tree: Tree) -> int:
    """The number of floating-point numbers in a tree."""
    return sum(x.size for x in jax.tree.leaves(tree) if is_float(x))


def is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def wide(x: Any) -> Any:
    """A floating-point dtype as at least float32, or a tree with its floating-point leaves so."""
    if isinstance(x, np.dtype):
        return jnp.promote_types(x, jnp.float32) if jnp.issubdtype(x, jnp.inexact) else x
    return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), x)


def split(tree: Tree) -> tuple[list, list, Callable[[list, list], Tree]]:
    """(floating-point leaves, the others, a function that puts such lists together again)."""
    leaves, structure = jax.tree.flatten(tree)
    floats = [is_float(x) for x in leaves]

    def merge(some: list, others: list) -> Tree:
        some_iter, others_iter = iter(some), iter(others)
        return structure.unflatten([next(some_iter if f else others_iter) for f in floats])

    def pick(wanted: bool) -> list:
        return [x for x, f in zip(leaves, floats, strict=True) if f is wanted]

    return pick(True), pick(False), merge


def with_integers(gradients: list, tree: Tree) -> Tree:
    """Gradients of `tree`'s floating-point leaves, and the float0 that JAX wants for the others."""
    _, others, merge = split(tree)
    return merge(gradients, [np.zeros(x.shape, jax.dtypes.float0) for x in others])


def add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, more)


def as_types(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
