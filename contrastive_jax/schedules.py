"""Schedules of learning rate and weight decay: step -> value."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def cosine_between(start: float, end: float, total_steps: int) -> optax.Schedule:
    """Half a cosine from `start` at step 0 to `end` at `total_steps`; it stays there.

    DINO's weight decay (Caron et al. 2021, arXiv:2104.14294): from 0.04 to 0.4.
    """

    def schedule(step: Any) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0.0, 1.0)
        return end + (start - end) * (1.0 + jnp.cos(jnp.pi * progress)) / 2.0

    return schedule


def warmup_cosine(
    peak: float,
    total_steps: int,
    warmup: float = 0.0,
    final_fraction: float = 0.0,
    initial_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear from a share of `peak` up to it, then half a cosine down to another.

    Args:
        peak: the highest learning rate.
        total_steps: the step at which the end value is reached; it stays there.
        warmup: fraction of total_steps in [0, 1], rounded to a whole number of steps; the step
            after them (the first one, without warm-up) has the peak.
        final_fraction: in [0, 1]: 0 for SimCLR, 0.001 for Barlow Twins.
        initial_fraction: in [0, 1]: 0 for most, 1/16 for SwAV.

    Source: Goyal et al. 2017, arXiv:1706.02677 (warm-up); Loshchilov and Hutter 2017,
    arXiv:1608.03983 (cosine).
    """
    rise = round(warmup * total_steps)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - rise) / max(total_steps - rise, 1), 0.0, 1.0)
        cosine = (1.0 + jnp.cos(jnp.pi * progress)) / 2.0
        fall = final_fraction + (1.0 - final_fraction) * cosine
        return peak * _after_warmup(step, rise, initial_fraction, fall)

    return schedule


def warmup_steps(
    peak: float,
    total_steps: int,
    milestones: Sequence[float],
    factor: float,
    warmup: float = 0.0,
    initial_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear from a share of `peak` up to it, then constant but for a drop at each milestone.

    Args:
        peak: the highest learning rate.
        total_steps: of the whole run.
        milestones: fractions of total_steps in [0, 1], each rounded to a whole number of steps; the
            step after them has the lower rate.
        factor: what the rate is multiplied by at each.
        warmup, initial_fraction: as in `warmup_cosine`.

    Source: Goyal et al. 2017, arXiv:1706.02677: a tenth after 30, 60 and 80 of 90 epochs.
    """
    rise = round(warmup * total_steps)
    drops = [round(m * total_steps) for m in milestones]

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        fall = jnp.float32(factor) ** sum(step >= drop for drop in drops)
        return peak * _after_warmup(step, rise, initial_fraction, fall)

    return schedule


def _after_warmup(step: jax.Array, rise: int, initial: float, fall: jax.Array) -> jax.Array:
    """The share of the peak: in the first `rise` steps a line from `initial` to 1, then `fall`."""
    climb = initial + (1.0 - initial) * step / max(rise, 1)
    return jnp.where(step < rise, climb, fall)
