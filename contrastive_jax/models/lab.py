"""Encoders of lightness, of colour, or one of each side by side, on images in Lab.

Dimension key: B batch, H W image, D features of a part, P parts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax.config import UserError, build, choose

CHANNELS = {'L': slice(0, 1), 'ab': slice(1, 3), 'Lab': slice(0, 3)}
HEADS = 'attention'  # [B, K, N]: the one output whose last axis is not its channels


class Lab(nn.Module):
    """See `make`."""

    sees: tuple[str, ...]
    part: Callable[[], nn.Module]  # not a module itself, which flax would give a name of its own

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, **inputs: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = [
            self.part().clone(parent=self, name=name)(x[..., CHANNELS[name]], train, **inputs)
            for name in self.sees
        ]
        features, named = zip(*found, strict=True)
        outputs = {
            name: jnp.concatenate([of[name] for of in named], axis=1 if name == HEADS else -1)
            for name in named[0]
        }
        return jnp.concatenate(features, axis=-1), outputs


def make(*, encoder: Mapping[str, Any], sees: Sequence[str] = ('L',), remat: bool = False) -> Lab:
    """An encoder of some channels of Lab, or several that share nothing, each of its own.

    Called as `module(x_BHW3, train)` on images as `inputs/lab` gives them, it returns the parts'
    features one behind the other, [B, P · D], and every other output likewise, along its channels.
    The parameters of a part are under its name.

    Args:
        encoder: name and options of the model of each part, as `config.model` has them elsewhere.
            Two halves of a network are two parts of half its width.
        sees: what each part is shown: 'L', 'ab' or 'Lab', each at most once.
        remat: of each part.

    Raises:
        UserError: another channel, the same one twice, or none; what the model raises.
    """
    where = 'config.model.sees'
    for name in sees:
        choose('channels', name, CHANNELS, where)
    if not sees or len(set(sees)) < len(sees):
        raise UserError(f'{where}: got {tuple(sees)}; expected different ones, at least one.')
    module = build('models', encoder, 'config.model.encoder', remat=remat)
    return Lab(tuple(sees), lambda: module)
