"""A slowly moving copy of a chain's first modules: what BYOL, MoCo and DINO learn to agree with.

It lives in `extra['target']` as {'params', 'stats'}, so it is checkpointed with everything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_jax.method import Batch, Encoders, Tree, online
from contrastive_jax.networks.chain import Chain

Momentum = float | Callable[[jax.Array], jax.Array]  # a number, or a function of progress


class Target:
    """The target network of a chain (MoCo's key encoder, DINO's teacher).

    Args:
        chain: the network that learns.
        modules: names of those that the target has.
        momentum: m of θ' ← m θ' + (1 − m) θ after every step.
        norm: 'batch': BatchNorm takes the batch's statistics and keeps averages of its own;
            'running': it takes the averages, which follow the chain's as the parameters do, so that
            an output depends on its own image alone (EMAN, Cai et al. 2021, arXiv:2101.08482).
    """

    def __init__(
        self, chain: Chain, modules: Sequence[str], momentum: Momentum, norm: str = 'batch'
    ):
        self.chain, self.modules, self.momentum = chain, modules, momentum
        self.by_batch = norm == 'batch'

    def copy(self, params: Tree, stats: Tree) -> Tree:
        """`extra['target']` at the start: the chain's parameters and averages as they are."""
        return {
            'params': {name: jax.tree.map(jnp.copy, params[name]) for name in self.modules},
            'stats': {name: jax.tree.map(jnp.copy, stats[name]) for name in self.modules},
        }

    def init(self, key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        """`Method.init` of a method that remembers nothing else."""
        params, extra = self.chain.start(key, batch, records)
        return params, {**extra, 'target': self.copy(params, extra['stats'])}

    def views(self, state: Tree, views_BVHWC: jax.Array) -> tuple[dict[str, Any], Tree]:
        """The target's outputs, which lead with [B, V] and have no gradient, and its new state.

        Args:
            state: `extra['target']`. Its averages alone are new, and only with norm='batch'.
            views_BVHWC: float, normalised.
        """
        outputs, stats = self.chain.views(
            state['params'], state['stats'], views_BVHWC, train=self.by_batch
        )
        return jax.lax.stop_gradient(outputs), {'params': state['params'], 'stats': stats}

    def follow(self, params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        """`Method.after`: the target a step closer to the chain."""
        del measured
        m = self.momentum(progress) if callable(self.momentum) else self.momentum
        target = {**extra['target'], 'params': ema(extra['target']['params'], params, m)}
        if not self.by_batch:
            target['stats'] = ema(target['stats'], extra['stats'], m)
        return {**extra, 'target': target}

    def encode(self, params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        """`Method.encode` of a method whose target is what evaluators see."""
        return self.chain.encode(extra['target']['params'], extra['target'], batch)

    def encoders(self, params: Tree, extra: Tree) -> Encoders:
        """`Method.encoders` of a method whose target is what evaluators see."""
        return online(extra['target']['params'], extra['target'])


def ema(moving: Tree, online: Tree, momentum: float | jax.Array) -> Tree:
    """θ' ← m θ' + (1 − m) θ (MoCo, He et al. 2020, eq. 2), of those modules that `moving` has."""
    online = {name: online[name] for name in moving}
    return jax.tree.map(lambda t, o: momentum * t + (1 - momentum) * o, moving, online)


def momentum_to_one(start: float) -> Callable[[jax.Array], jax.Array]:
    """A momentum that rises from `start` to 1 by half a cosine (BYOL, Grill et al. 2020, 3.3)."""
    return lambda progress: 1.0 - (1.0 - start) * (jnp.cos(jnp.pi * progress) + 1) / 2


def ramp(progress: jax.Array, start: float, end: float, share: float) -> jax.Array:
    """Linear from `start` to `end` over the first `share` of the run, then `end`."""
    done = jnp.minimum(progress / share, 1.0) if share else jnp.ones_like(progress)
    return start + (end - start) * done
