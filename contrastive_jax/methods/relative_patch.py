"""Where a tile lies beside another (Doersch et al. 2015, https://arxiv.org/abs/1505.05192).

Two neighbouring tiles of an image's grid go through one encoder, and a classifier on both says in
which of eight directions the second lies from the first. Whoever can say so knows things and their
parts. What would give it away without that is taken from the tiles by the inputs `patches`.

Dimension key: B batch, N tiles, P pairs, K directions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_jax import models
from contrastive_jax.config import UserError, check_range
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Aux, Batch, Method, Task, Tree
from contrastive_jax.networks.tiles import Tiles

# (down, right) of the second tile, row by row.
DIRECTIONS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def make(model: models.Encoder, *, hidden: int = 4096, layers: int = 2) -> Method:
    """An MLP on the features of two tiles; every tile is paired with all of its neighbours.

    Paper: the cross-entropies' sum, with a learning rate for it; here: their mean. Paper: BatchNorm
    has neither scale nor offset; here: it is the encoder's. Evaluators see the encoder's features
    of whole images; of the task, the share of directions that are found, each direction alike.

    Args:
        model: the encoder.
        hidden: width of the MLP's hidden layers.
        layers: of the MLP.
    """
    check_range('config.method', {'hidden': hidden}, least=1, whole=True, who='relative_patch')
    check_range('config.method', {'layers': layers}, least=1, whole=True, who='relative_patch')
    network = Tiles(model, MLP(hidden, len(DIRECTIONS), layers=layers), together=2)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        pairs(batch['views'].shape[1])
        return network.start(key, batch, records)

    def logits(
        params: Tree, extra: Tree, batch: Batch, **options: Any
    ) -> tuple[jax.Array, Tree, np.ndarray]:
        first_second_P2, direction_P = pairs(batch['views'].shape[1])
        B, P = len(batch['views']), len(direction_P)
        chosen = jnp.broadcast_to(jnp.asarray(first_second_P2)[None], (B, P, 2))
        found, stats = network(params, extra['stats'], batch['views'], chosen, **options)
        return found, stats, direction_P

    def right(logits_BPK: jax.Array, direction_P: np.ndarray) -> jax.Array:
        """The share of each record's pairs that is found, [B], every direction alike."""
        weight_P = 1 / np.bincount(direction_P)[direction_P] / len(DIRECTIONS)
        found_BP = logits_BPK.argmax(2) == direction_P[None]
        return found_BP.astype(jnp.float32) @ jnp.asarray(weight_P, jnp.float32)

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        found, stats, direction_P = logits(params, extra, batch, key=key)
        label_BP = jnp.broadcast_to(direction_P[None], found.shape[:2])
        value = optax.softmax_cross_entropy_with_integer_labels(found, label_BP).mean()
        return value, Aux({'stats': stats}, {'accuracy': right(found, direction_P).mean()})

    def score(params: Tree, extra: Tree, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del key
        found, _, direction_P = logits(params, extra, batch, train=False)
        return {'accuracy': right(found, direction_P)}

    return Method(init, loss, network.chain.encode, task=Task(score, {'accuracy': '%'}))


def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of neighbours of a square grid, in both orders.

    Args:
        count: N, tiles of the grid.

    Returns:
        [P, 2] numbers of the first and the second tile, and [P] int32 of DIRECTIONS.

    Raises:
        UserError: N is no square number, or too small.
    """
    side = math.isqrt(count)
    if side**2 != count or side < 2:
        raise UserError(
            f'config.inputs: got {count} views; relative_patch needs a square grid of tiles, '
            "as the inputs 'patches' give it."
        )
    found = [
        (side * i + j, side * (i + down) + j + right, k)
        for i in range(side)
        for j in range(side)
        for k, (down, right) in enumerate(DIRECTIONS)
        if 0 <= i + down < side and 0 <= j + right < side
    ]
    table = np.asarray(found, np.int32)
    return table[:, :2], table[:, 2]
