"""A queue of what earlier batches gave: MoCo's keys, NNCLR's support set, SwAV's embeddings.

It lives in `extra`, so it is checkpointed, and moves in `Method.after`, once a step.
"""

import jax
import jax.numpy as jnp


def random_queue(key: jax.Array, size: int, *shape: int) -> jax.Array:
    """A queue of random unit vectors [K, ..., D], as MoCo's starts."""
    x = jax.random.normal(key, (size, *shape))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def enqueue(queue_K: jax.Array, items_B: jax.Array) -> jax.Array:
    """The queue with a batch put in at its end and the oldest ones gone; any B and K."""
    items_B = jax.lax.stop_gradient(items_B).astype(queue_K.dtype)
    return jnp.concatenate([queue_K, items_B])[-queue_K.shape[0] :]
