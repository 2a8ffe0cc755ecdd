"""One file a model; each exports `make(**options) -> flax.linen.Module`.

A model is called as `module(x_BHWC, train) -> (features_BD, intermediates)`: x in floats of any
range, features in float32, intermediates a dict of named float32 arrays. Parameters are float32
whatever the compute dtype. `init` and `apply` are all that the rest of the code needs of flax.
"""

from typing import Any

import flax.linen as nn
import jax


def init(module: nn.Module, key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    """`(params, stats)` of a module; stats, its BatchNorm running averages, is {} without any."""
    variables = module.init(key, x, train=False)
    return variables.get('params', {}), variables.get('batch_stats', {})


def apply(module: nn.Module, params: Any, stats: Any, x: jax.Array, train: bool) -> tuple[Any, Any]:
    """`(module(x, train), new stats)`; with train=False, or no BatchNorm, stats as they came."""
    if not stats:
        return module.apply({'params': params}, x, train=train), stats
    variables = {'params': params, 'batch_stats': stats}
    if not train:
        return module.apply(variables, x, train=False), stats
    outputs, new = module.apply(variables, x, train=True, mutable=['batch_stats'])
    return outputs, new['batch_stats']
