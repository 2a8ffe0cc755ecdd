"""Optimisers and the learning-rate schedule, from optax."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_jax.config import UserError, choose, unknown

WHERE = 'config.optim'
INFINITY = float('inf')
RANGES = {
    'learning_rate': (0, INFINITY),
    'weight_decay': (0, INFINITY),
    'warmup': (0, 1),
    'final_fraction': (0, 1),
    'clip_norm': (0, INFINITY),
    'momentum': (0, 1),
    'b1': (0, 1),
    'b2': (0, 1),
    'eps': (0, INFINITY),
    'trust_coefficient': (0, INFINITY),
    'total_steps': (1, INFINITY),
    'batch_size': (1, INFINITY),
}


def decayed(params: Any) -> Any:
    """True for each parameter that takes weight decay: the kernels.

    Not decayed are all with fewer than two dimensions, leading ones of size 1 not counted (biases,
    scales and offsets of norms, CLS and mask tokens, temperatures), and position embeddings.

    Args:
        params: a tree of arrays.

    Returns:
        A tree of bools of the same structure.
    """

    def rule(path: tuple, x: jax.Array) -> bool:
        shape = list(x.shape)
        while shape and shape[0] == 1:
            shape.pop(0)
        return len(shape) >= 2 and getattr(path[-1], 'key', '') != 'position_embedding'

    return jax.tree_util.tree_map_with_path(rule, params)


def warmup_cosine(
    peak: float, total_steps: int, warmup: float = 0.0, final_fraction: float = 0.0
) -> optax.Schedule:
    """Linear from 0 to `peak`, then half a cosine down to `final_fraction * peak`.

    Args:
        peak: the highest learning rate.
        total_steps: the step at which the end value is reached; it stays there.
        warmup: fraction of total_steps in [0, 1], rounded to a whole number of steps; the step
            after them (the first one, without warm-up) has the peak.
        final_fraction: in [0, 1]: 0 for SimCLR, 0.001 for Barlow Twins.

    Source: Goyal et al. 2017, arXiv:1706.02677 (warm-up); Loshchilov and Hutter 2017,
    arXiv:1608.03983 (cosine).
    """
    rise = round(warmup * total_steps)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - rise) / max(total_steps - rise, 1), 0.0, 1.0)
        cosine = (1.0 + jnp.cos(jnp.pi * progress)) / 2.0
        fall = final_fraction + (1.0 - final_fraction) * cosine
        return peak * jnp.where(step < rise, step / max(rise, 1), fall)

    return schedule


def _adamw(
    rate: optax.Schedule,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW, decay decoupled and times the rate (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


def _sgd(
    rate: optax.Schedule, weight_decay: float, momentum: float = 0.9
) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum and L2 decay added to the gradient, as torch's."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed), optax.sgd(rate, momentum=momentum)
    )


def _lars(
    rate: optax.Schedule,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """LARS (You et al. 2017, arXiv:1708.03888), biases and norms by plain SGD as in SimCLR."""
    return optax.lars(
        rate,
        weight_decay=weight_decay,
        weight_decay_mask=decayed,
        trust_coefficient=trust_coefficient,
        trust_ratio_mask=decayed,
        momentum=momentum,
    )


def _lamb(
    rate: optax.Schedule,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, arXiv:1904.00962), biases and norms by plain Adam.

    Paper: a trust ratio for every parameter; here: for the decayed ones only, because a
    bias that starts at 0 could only grow by a factor of 1 + rate a step. So this is `optax.lamb`
    with its trust ratio masked, which it has no option for.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.masked(optax.scale_by_trust_ratio(), decayed),
        optax.scale_by_learning_rate(rate),
    )


OPTIMISERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    'adamw': _adamw,
    'sgd': _sgd,
    'lars': _lars,
    'lamb': _lamb,
}


def make(
    *,
    name: str,
    learning_rate: float,
    total_steps: int,
    batch_size: int,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    final_fraction: float = 0.0,
    clip_norm: float = 0.0,
    **options: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimiser whose learning rate warms up linearly and falls by a cosine.

    Args:
        name: 'adamw', 'sgd', 'lars' or 'lamb'.
        learning_rate: for 256 samples; the peak is learning_rate * batch_size / 256 (Goyal et al.
            2017, arXiv:1706.02677). Not negative.
        total_steps: optimiser steps of the whole run, at least 1.
        batch_size: the global batch: samples (not views) in one optimiser step, over all devices
            and accumulated micro-batches.
        weight_decay: at least 0; which parameters take it: `decayed`.
        warmup: fraction of total_steps in [0, 1] (see `warmup_cosine`).
        final_fraction: learning rate at the end over its peak, in [0, 1].
        clip_norm: gradients are scaled down to this global norm before the optimiser; 0: never.
        **options: adamw: b1, b2, eps; sgd: momentum; lars: momentum, trust_coefficient;
            lamb: b1, b2, eps.

    Returns:
        The transformation, whose update needs the params, and the schedule: step -> learning rate.

    Raises:
        UserError: an unknown name or option, or a value outside its range.
    """
    optimiser = choose('optimiser', name, OPTIMISERS, WHERE)
    shared = {
        'learning_rate': learning_rate,
        'weight_decay': weight_decay,
        'warmup': warmup,
        'final_fraction': final_fraction,
        'clip_norm': clip_norm,
    }
    own = list(inspect.signature(optimiser).parameters)[2:]
    for key in options:
        if key not in own:
            raise unknown(f'key for {name}', key, [*own, *shared], WHERE)
    steps = {'total_steps': total_steps, 'batch_size': batch_size}
    for key, value in (shared | options | steps).items():
        low, high = RANGES[key]
        if not low <= value <= high or value == INFINITY:
            upper = '' if high == INFINITY else f' and at most {high:g}'
            where = f'{WHERE}.{key}' if key not in steps else f'config.{key}'
            raise UserError(f'{where}: got {value}; expected a number of at least {low:g}{upper}.')
    schedule = warmup_cosine(learning_rate * batch_size / 256, total_steps, warmup, final_fraction)
    transformation = optimiser(schedule, weight_decay, **options)
    if clip_norm:
        transformation = optax.chain(optax.clip_by_global_norm(clip_norm), transformation)
    return transformation, schedule
