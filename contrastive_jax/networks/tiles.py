"""An encoder of single tiles, and a head on several of them side by side.

Each tile is encoded by itself (a context-free network, Noroozi and Favaro 2016, arXiv:1603.09246),
so tiles that are put into another order are their features in that order.

Dimension key: B batch, N tiles, D features, P choices of tiles, M tiles of a choice, K classes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_jax import models
from contrastive_jax.method import Batch, Tree
from contrastive_jax.networks.chain import Chain


class Tiles:
    """The encoder and what follows it for single tiles, and the head.

    Args:
        encoder: of one tile.
        head: `[rows, M · D] -> [rows, K]`, of tiles one behind the other.
        together: M.
        **each: heads of single tiles before it, see `Chain`.
    """

    def __init__(self, encoder: models.Encoder, head: Any, together: int, **each: Any):
        self.chain, self.head, self.together = Chain(encoder, **each), head, together
        self.last = next(reversed(each), 'encoder')

    def start(self, key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        """`Method.init` of a method whose `extra` holds the averages alone, 'stats'."""
        one_key, head_key = jax.random.split(key)
        params, extra = self.chain.start(one_key, batch, records)
        out, _ = self.chain(params, extra['stats'], batch['views'][:, 0], train=False)
        x = jnp.tile(out[self.last], (1, self.together))
        params['head'], extra['stats']['head'] = models.init(self.head, head_key, x)
        return params, extra

    def __call__(
        self,
        params: Tree,
        stats: Tree,
        tiles_BN: jax.Array,
        chosen_BPM: jax.Array,
        *,
        train: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Logits [B, P, K] of the chosen tiles in their order, and the averages.

        Args:
            params, stats: of `start`.
            tiles_BN: [B, N, t, t, C].
            chosen_BPM: numbers of tiles, from 0.
            train: see `Chain`.
            key: for what the encoder draws.
        """
        out, new = self.chain.views(params, stats, tiles_BN, train=train, key=key)
        B, P, M = chosen_BPM.shape
        rows = jnp.take_along_axis(out[self.last], chosen_BPM.reshape(B, P * M, 1), axis=1)
        logits, head = models.apply(
            self.head, params['head'], stats['head'], rows.reshape(B * P, -1), train
        )
        return logits.reshape(B, P, -1), {**new, 'head': head}
