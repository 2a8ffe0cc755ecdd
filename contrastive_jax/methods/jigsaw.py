"""Putting tiles into order (Noroozi and Favaro 2016, https://arxiv.org/abs/1603.09246).

The tiles of an image's grid are shuffled by one of many permutations, and a classifier on all of
them says by which. Each tile is encoded by itself (a context-free network), so that features of
shuffled tiles are shuffled features. What would give the order away without knowing things is taken
from the tiles by the inputs `patches`.

Dimension key: B batch, N tiles, P permutations of an image, K permutations in all.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_jax import models
from contrastive_jax.config import UserError, check_range
from contrastive_jax.layers.heads import MLP, Hidden
from contrastive_jax.method import Aux, Batch, Method, Task, Tree
from contrastive_jax.networks.tiles import Tiles

MOST = 9  # tiles: 10! permutations would not fit


def make(
    model: models.Encoder,
    *,
    tiles: int = 9,
    permutations: int = 1000,
    orders: int = 1,
    width: int = 512,
    hidden: int = 4096,
    layers: int = 2,
) -> Method:
    """A hidden layer on each tile and an MLP on all of them one behind the other.

    Evaluators see the encoder's features of whole images; of the task, the share of permutations
    that are found.

    Args:
        model: the encoder.
        tiles: N of the inputs, from 2 to 9.
        permutations: K, how many of the N! are used, those that differ the most: see `far_apart`.
        orders: P, permutations that each image is shown in at a step, drawn with replacement.
        width: of the layer on each tile, which has BatchNorm and ReLU.
        hidden: width of the MLP's hidden layers.
        layers: of the MLP.
    """
    numbers = {'permutations': permutations, 'tiles': tiles}
    check_range('config.method', numbers, least=2, whole=True, who='jigsaw')
    check_range('config.method', {'tiles': tiles}, least=2, most=MOST, whole=True, who='jigsaw')
    numbers = {'orders': orders, 'width': width, 'hidden': hidden, 'layers': layers}
    check_range('config.method', numbers, least=1, whole=True, who='jigsaw')
    table_KN = far_apart(tiles, permutations)
    network = Tiles(
        model,
        MLP(hidden, permutations, layers=layers),
        together=tiles,
        tile=Hidden(width),
    )

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        if batch['views'].shape[1] != tiles:
            raise UserError(
                f'config.inputs: got {batch["views"].shape[1]} views; jigsaw needs {tiles} tiles, '
                "as the inputs 'patches' give them."
            )
        return network.start(key, batch, records)

    def answered(
        params: Tree, extra: Tree, batch: Batch, order_key: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Logits [B, P, K] of drawn permutations, these [B, P], and the averages."""
        drawn_BP = jax.random.randint(order_key, (len(batch['views']), orders), 0, permutations)
        # Tile j of a shuffled image is the image's tile permutation[j].
        chosen_BPN = jnp.asarray(table_KN)[drawn_BP]
        logits_BPK, stats = network(params, extra['stats'], batch['views'], chosen_BPN, **options)
        return logits_BPK, drawn_BP, stats

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        order_key, drop_key = jax.random.split(key)
        logits_BPK, drawn_BP, stats = answered(params, extra, batch, order_key, key=drop_key)
        value = optax.softmax_cross_entropy_with_integer_labels(logits_BPK, drawn_BP).mean()
        accuracy = (logits_BPK.argmax(2) == drawn_BP).mean()
        return value, Aux({'stats': stats}, {'accuracy': accuracy})

    def score(params: Tree, extra: Tree, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        logits_BPK, drawn_BP, _ = answered(params, extra, batch, key, train=False)
        return {'accuracy': (logits_BPK.argmax(2) == drawn_BP).mean(1)}

    return Method(init, loss, network.chain.encode, task=Task(score, {'accuracy': '%'}))


@functools.cache
def far_apart(tiles: int, count: int, seed: int = 0) -> np.ndarray:
    """Permutations that differ in many places: [count, tiles] int32, always the same.

    The first is drawn; each further one has the largest mean Hamming distance to those before it,
    as in the authors' code.

    Args:
        tiles: N.
        count: how many, at most N!.
        seed: of the first.

    Raises:
        UserError: there are not so many.
    """
    every_NF = np.asarray(list(itertools.permutations(range(tiles))), np.int8).T.copy()
    most = every_NF.shape[1]
    if count > most:
        raise UserError(
            f'config.method.permutations: got {count}; {tiles} tiles have {most} permutations.'
        )
    distance_F = np.zeros(most, np.int32)  # to all of those chosen so far
    chosen = [int(np.random.default_rng(seed).integers(most))]
    while len(chosen) < count:
        for place_F in every_NF:
            distance_F += place_F != place_F[chosen[-1]]
        distance_F[chosen[-1]] = np.iinfo(np.int32).min // 2  # never again
        chosen.append(int(distance_F.argmax()))
    return every_NF[:, chosen].T.astype(np.int32)
