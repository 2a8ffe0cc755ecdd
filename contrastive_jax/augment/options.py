"""The frame that tells an operation of the batch, and the options that operations share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from contrastive_jax.config import UserError, check_range

# (key, draw_BVR, x_BVCHW) -> x_BVCHW, on images in [0, 1]. `draw` holds R numbers from U[0, 1) for
# each image; the first is the coin. `key` is for draws as large as the image.
Apply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Frame(NamedTuple):
    """Where an operation's options come from and the views that it will see."""

    where: str
    views: int  # V, the (global) views of an image
    size: int  # of the side of what it will see
    local_views: int = 0  # L
    local: bool = False  # whether it will see these instead


def number(name: str, value: Any, frame: Frame, low: float, high: float = math.inf) -> float:
    """`value` as a float within [low, high], or an error that names the option."""
    check_range(frame.where, {name: value}, least=low, most=high)
    return float(value)


def interval(
    name: str, value: Any, frame: Frame, low: float, high: float = math.inf
) -> tuple[float, float]:
    """A pair (lowest, highest) within [low, high]; a single number stands for both."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise UserError(
            f'{frame.where}.{name}: got {value!r}; expected a number or a pair (lowest, highest).'
        )
    lowest, highest = (number(name, v, frame, low, high) for v in pair)
    if lowest > highest:
        raise UserError(f'{frame.where}.{name}: the pair {value!r} is not in ascending order.')
    return lowest, highest


def chance(prob: float | Sequence[float], frame: Frame) -> Callable[[jax.Array], jax.Array]:
    """The coin of an operation: draw_BVR -> bool [B, V], True where it is applied.

    Args:
        prob: the probability, in [0, 1]: a number for all views or one for each of the V views
            and, where there are local views, a last one for all of these.
        frame: of the operation.
    """
    V, L = frame.views, frame.local_views
    expected = V + (L > 0)
    each = list(prob) if isinstance(prob, (tuple, list)) else [prob] * expected
    if len(each) != expected:
        more = f' and a last one for the local views ({expected} in all)' if L else ''
        raise UserError(
            f'{frame.where}.prob: got {prob!r}; expected a number or a tuple with one for each of '
            f'the {V} views{more}.'
        )
    each = [number('prob', p, frame, 0, 1) for p in each]
    prob_V = np.asarray(each[V:] * L if frame.local else each[:V], np.float32)

    # Draws are in [0, 1): never below 0, always below 1.
    return lambda draw_BVR: draw_BVR[..., 0] < prob_V[None, :]
