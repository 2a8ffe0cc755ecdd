"""What a method is: a NamedTuple of pure functions, as optax's optimisers are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Tree = Any  # a pytree of arrays
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def keep(params: Tree, extra: Tree, step: jax.Array) -> Tree:
    """The `after` of a method whose `extra` changes in `loss` alone."""
    del params, step
    return extra


class Method(NamedTuple):
    """A self-supervised method. Trainer, sharding and checkpoints know nothing else of it.

    `extra` is whatever must survive a restart beside the parameters: BatchNorm statistics, a
    target network, a queue and its cursor, prototypes. Nobody but the method looks inside.

    Attributes:
        init: `(key, batch) -> (params, extra)`; run abstractly for shapes, and under jit.
        loss: `(params, extra, batch, key, step) -> (loss, (extra, metrics))`: the scalar loss,
            differentiated in `params` alone. `batch['views']` is [B, V, H, W, 3] float, augmented
            and normalised; `batch['label']` and `batch['index']` are [B] int32. B is the global
            batch: write single-device mathematics.
        encode: `(params, extra, batch) -> {'features': [B, D], ...}` from `batch['image']`
            [B, H, W, 3] float, normalised: all that evaluators and export see.
        after: `(params, extra, step) -> extra`, in the jitted step after the optimiser.
    """

    init: Callable[[jax.Array, Batch], tuple[Tree, Tree]]
    loss: Callable[..., tuple[jax.Array, tuple[Tree, Metrics]]]
    encode: Callable[[Tree, Tree, Batch], dict[str, jax.Array]]
    after: Callable[[Tree, Tree, jax.Array], Tree] = keep
