"""Normalisation as all convolutional networks and heads have it."""

from typing import Any

import flax.linen as nn


def batch_norm(train: bool, **options: Any) -> nn.BatchNorm:
    """BatchNorm of the global batch, whose averages move by a tenth, as torch's.

    Args:
        train: by the batch's statistics, not by the averages.
        **options: flax's others: name, dtype, epsilon, use_bias, use_scale, scale_init.
    """
    fast = {'use_fast_variance': False}  # E[x²] − E[x]² cancels
    shared = {'use_running_average': not train, 'momentum': 0.9, 'epsilon': 1e-5, **fast}
    return nn.BatchNorm(**{**shared, **options})
