"""What methods remember between steps: a slowly moving target network and a queue of embeddings.

Both live in `TrainState.extra`, so they are checkpointed and a continued run has the same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from contrastive_jax.method import Tree


def cosine(progress: jax.Array, start: float, end: float) -> jax.Array:
    """From `start` at progress 0 to `end` at 1 by half a cosine (BYOL, Grill et al. 2020, 3.3)."""
    return end - (end - start) * (jnp.cos(jnp.pi * progress) + 1) / 2


def ramp(progress: jax.Array, start: float, end: float, share: float) -> jax.Array:
    """Linear from `start` to `end` over the first `share` of the run, then `end`."""
    done = jnp.minimum(progress / share, 1.0) if share else jnp.ones_like(progress)
    return start + (end - start) * done


def target(params: Tree, stats: Tree, modules: tuple[str, ...]) -> Tree:
    """A target network at the start: copies of the named modules' parameters and averages."""
    return {
        'params': {name: jax.tree.map(jnp.copy, params[name]) for name in modules},
        'stats': {name: jax.tree.map(jnp.copy, stats[name]) for name in modules},
    }


def follow(moving: Tree, online: Tree, momentum: float | jax.Array) -> Tree:
    """θ' ← m θ' + (1 − m) θ (MoCo, He et al. 2020, eq. 2), of those modules that `moving` has."""
    online = {name: online[name] for name in moving}
    return jax.tree.map(lambda t, o: momentum * t + (1 - momentum) * o, moving, online)


def move(extra: Tree, params: Tree, momentum: float | jax.Array) -> Tree:
    """`extra` with the parameters of its 'target' moved towards the online ones."""
    moved = follow(extra['target']['params'], params, momentum)
    return {**extra, 'target': {**extra['target'], 'params': moved}}


def rising(start: float) -> Callable[[Tree, Tree, Tree, jax.Array], Tree]:
    """`Method.after` of a target whose momentum goes from `start` to 1 by a cosine (BYOL)."""

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        del measured
        return move(extra, params, cosine(progress, start, 1.0))

    return after


def steady(momentum: float, *, averages: bool) -> Callable[[Tree, Tree, Tree, jax.Array], Tree]:
    """`Method.after` of a target with one momentum, whose BatchNorm averages may follow, too."""

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        del measured, progress
        extra = move(extra, params, momentum)
        if averages:
            extra['target']['stats'] = follow(extra['target']['stats'], extra['stats'], momentum)
        return extra

    return after


def queue(key: jax.Array, size: int, *shape: int) -> jax.Array:
    """A queue of random unit vectors [K, ..., D], as MoCo's starts."""
    x = jax.random.normal(key, (size, *shape))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def enqueue(queue_K: jax.Array, items_B: jax.Array) -> jax.Array:
    """The queue with a batch put in at its end and the oldest ones gone; any B and K."""
    items_B = jax.lax.stop_gradient(items_B).astype(queue_K.dtype)
    return jnp.concatenate([queue_K, items_B])[-queue_K.shape[0] :]
