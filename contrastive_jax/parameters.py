"""Kinds of parameters, by name and shape, and their rates of learning beside each other."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

from contrastive_jax.config import UserError

KINDS = ('kernels', 'embeddings', 'positions', 'tokens', 'vectors')
BLOCK = re.compile(r'(?:stage(\d+)_)?block(\d+)')
BEFORE_BLOCKS = re.compile(r'stem.*|(?:.*_)?(?:embedding|tokens?)')
PATCHES = 'patch_embedding'
NAMES: Mapping[str, re.Pattern[str]] = {
    'embeddings': re.compile('token_embedding'),
    'positions': re.compile('position_embedding'),
    'tokens': re.compile('(?:.*_)?tokens?|probe'),
    'kernels': re.compile('length'),  # a weight norm's, a number for each row of its matrix
}


def names(path: tuple) -> tuple[str, ...]:
    """('encoder', 'block0', ...) of a path that `jax.tree_util` gives."""
    return tuple(str(getattr(entry, 'key', entry)) for entry in path)


def kinds(params: Any) -> Any:
    """The kind of each parameter, one of KINDS.

    'kernels' are the matrices of linear layers and convolutions; 'embeddings' the table of a text's
    tokens; 'positions' those that are learned; 'tokens' CLS, mask and register tokens and the query
    of attention pooling; 'vectors' all else: biases, scales and offsets of norms, temperatures.

    Args:
        params: a tree of arrays.

    Returns:
        A tree of strings of the same structure.
    """

    def kind(path: tuple, x: jax.Array) -> str:
        for kind, pattern in NAMES.items():
            if path and pattern.fullmatch(names(path)[-1]):
                return kind
        # [1, D] and [1, 1, D] are vectors.
        shape = list(x.shape)
        while shape and shape[0] == 1:
            shape.pop(0)
        return 'kernels' if len(shape) >= 2 else 'vectors'

    return jax.tree_util.tree_map_with_path(kind, params)


def of_kinds(params: Any, chosen: Collection[str]) -> Any:
    """True for each parameter whose kind is chosen."""
    return jax.tree.map(lambda kind: kind in chosen, kinds(params))


def rate_factors(
    params: Any, layer_decay: float = 1.0, patch_embedding: float = 1.0, vectors: float = 1.0
) -> Any:
    """Factors of the learning rate, one for each parameter.

    A module whose parts are named block0, block1, ... (or stage1_block0, ...) has layers: in a
    stack of L blocks the last one has layer_decay, the first one layer_decay^L, and what lies
    before them in the same module (stem..., ..._embedding, ..._token(s)) layer_decay^(L + 1). All
    else is after the blocks, or has none, and keeps its rate.

    Args:
        params: a tree of arrays.
        layer_decay: in [0, 1] (BEiT, Bao et al. 2022, arXiv:2106.08254, after ELECTRA).
        patch_embedding: a further factor of the patches' linear layer (DINOv2's code: 0.2).
        vectors: a further factor of all parameters of that kind (Barlow Twins' code: 0.024).

    Returns:
        A tree of floats of the same structure.

    Raises:
        UserError: a layer_decay, but no blocks are found; a factor for patches, but none are.
    """

    def place(name: str) -> tuple[int, int] | None:
        match = BLOCK.fullmatch(name)
        return (int(match[1] or 0), int(match[2])) if match else None

    stacks: dict[tuple[str, ...], set[tuple[int, int]]] = {}  # module -> its blocks
    found = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        parts = names(path)
        found |= set(parts)
        for i, name in enumerate(parts):
            if block := place(name):
                stacks.setdefault(parts[:i], set()).add(block)
    if layer_decay != 1 and not stacks:
        raise UserError(
            f'config.optim.layer_decay: got {layer_decay}, but the parameters have no blocks.'
        )
    if patch_embedding != 1 and PATCHES not in found:
        raise UserError(
            f'config.optim.patch_embedding_rate: got {patch_embedding}, but no parameter is a '
            f'{PATCHES}.'
        )

    def layer(parts: tuple[str, ...]) -> int:
        """Its distance below the top, in layers."""
        for i, name in enumerate(parts):
            blocks = sorted(stacks.get(parts[:i], ()))
            if blocks and (block := place(name)):
                return len(blocks) - blocks.index(block)
            if blocks and BEFORE_BLOCKS.fullmatch(name):
                return len(blocks) + 1
        return 0

    def factor(path: tuple, kind: str) -> float:
        parts = names(path)
        further = (
            patch_embedding if PATCHES in parts else 1.0,
            vectors if kind == 'vectors' else 1.0,
        )
        return layer_decay ** layer(parts) * math.prod(further)

    return jax.tree_util.tree_map_with_path(factor, kinds(params))
