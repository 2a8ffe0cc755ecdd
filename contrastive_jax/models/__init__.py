"""One file a model; each exports `make(*, remat, **options) -> flax.linen.Module`.

A model is called as `module(x_BHWC, train) -> (features_BD, intermediates)`: x in floats of any
range, features in float32, intermediates a dict of named float32 arrays. Parameters are float32
whatever the compute dtype. `init` and `apply` are all that the rest of the code needs of flax.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Microbatched(NamedTuple):
    """An encoder that trains on one part of the batch after another: exact gradient caching.

    The parts' features together are the batch's, so a loss on them sees every negative; the
    backward pass encodes each part again, so that the activations of one part are all that is held
    (GradCache, Gao et al. 2021, arXiv:2101.06983, here by `jax.checkpoint`). Gradients equal those
    of the whole batch, except through BatchNorm: each part has its own statistics, and its running
    averages see the parts one after another.
    """

    module: nn.Module
    parts: int


Encoder = nn.Module | Microbatched


def init(module: Encoder, key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    """`(params, stats)` of a module; stats, its BatchNorm running averages, is {} without any."""
    if isinstance(module, Microbatched):
        module = module.module
    variables = module.init(key, x, train=False)
    return variables.get('params', {}), variables.get('batch_stats', {})


def apply(module: Encoder, params: Any, stats: Any, x: jax.Array, train: bool) -> tuple[Any, Any]:
    """`(module(x, train), new stats)`; with train=False, or no BatchNorm, stats as they came."""
    if isinstance(module, Microbatched):
        if train and module.parts > 1:
            return _by_parts(*module, params, stats, x)
        module = module.module
    if not stats:
        return module.apply({'params': params}, x, train=train), stats
    variables = {'params': params, 'batch_stats': stats}
    if not train:
        return module.apply(variables, x, train=False), stats
    outputs, new = module.apply(variables, x, train=True, mutable=['batch_stats'])
    return outputs, new['batch_stats']


def _by_parts(
    module: nn.Module, parts: int, params: Any, stats: Any, x: jax.Array
) -> tuple[Any, Any]:
    # Row i goes to part i % parts, so that each keeps its rows spread over the devices as they are.
    split = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    @jax.checkpoint
    def encode(stats: Any, part: jax.Array) -> tuple[Any, Any]:
        outputs, stats = apply(module, params, stats, part, train=True)
        return stats, outputs

    stats, outputs = jax.lax.scan(encode, stats, split)
    return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(-1, *y.shape[2:]), outputs), stats
