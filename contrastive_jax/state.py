"""TrainState and the functions that make and advance it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_jax import parallel
from contrastive_jax.method import Aux, Batch, Method, Metrics, Tree


class TrainState(NamedTuple):
    """Everything that must survive a restart.

    No key is stored: the randomness of step s is `fold_in(key(seed), s)`.
    """

    step: jax.Array  # int32 scalar: optimiser steps taken
    params: Tree
    opt: Tree
    extra: Tree  # the method's own: see method.Method


def make_init(
    method: Method, tx: optax.GradientTransformation, seed: int | jax.Array, records: int
) -> Callable[[Batch], TrainState]:
    """`init(batch) -> TrainState`, to be jitted (two leaves of a state must not alias).

    Args:
        method: gives parameters and its own state.
        tx: the optimiser.
        seed: of the parameters.
        records: in the training split.
    """

    def init(batch: Batch) -> TrainState:
        # A stream of its own: steps fold their number into key(seed).
        params, extra = method.init(jax.random.key(seed ^ 0x5EED), batch, records)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra)

    return init


def make_step(
    method: Method,
    tx: optax.GradientTransformation,
    augment: Callable[[jax.Array, Batch], Batch],
    seed: int | jax.Array,
    total_steps: int,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
        method: gives the loss.
        tx: the optimiser.
        augment: `(key, batch) -> batch` in floats, over the whole global batch: see
            `inputs.Transform.device`.
        seed: of augmentation and of whatever the loss draws.
        total_steps: of the whole run, what `progress` is a share of.
        accumulate: the batch is cut into this many micro-batches whose gradients are averaged.
            Each micro-batch has its own loss (its own negatives, its own BatchNorm statistics,
            a queue and a centre as they were before the step). See `method.Aux`.
    """

    def gradient(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[Tree, Aux]:
        grad = jax.value_and_grad(method.loss, has_aux=True)
        (loss, aux), grads = grad(params, extra, batch, key, progress)
        return grads, aux._replace(metrics={'loss': loss, **aux.metrics})

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        batch = augment(augment_key, batch)
        progress = state.step.astype(jnp.float32) / total_steps
        if accumulate == 1:
            grads, aux = gradient(state.params, state.extra, batch, loss_key, progress)
        else:
            parts = parallel.split_rows(batch, accumulate)
            keys = jax.random.split(loss_key, accumulate)

            def body(carry: tuple[Tree, Tree], part: tuple[Batch, jax.Array]):
                grads, extra = carry
                more, aux = gradient(state.params, extra, *part, progress)
                return (jax.tree.map(jnp.add, grads, more), aux.extra), aux[1:]

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            start = zeros, state.extra
            (grads, extra), (metrics, measured) = jax.lax.scan(body, start, (parts, keys))
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = jax.tree.map(lambda m: m.mean(0), metrics)
            aux = Aux(extra, metrics, parallel.join_rows(measured))
        updates, opt = tx.update(grads, state.opt, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        extra = method.after(params, aux.extra, aux.measured, progress)
        metrics = {**aux.metrics, 'grad_norm': optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt, extra), metrics

    return step
