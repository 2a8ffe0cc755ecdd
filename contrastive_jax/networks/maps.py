"""An encoder and heads that say something of every place of its image.

Dimension key: B batch, H W image, h w places, D channels, N patches, K outputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.layers.convolution import Conv
from contrastive_jax.layers.norm import batch_norm
from contrastive_jax.method import Tree
from contrastive_jax.networks.chain import Chain


class Places(nn.Module):
    """3 x 3 convolutions with BatchNorm and ReLU, one at each size, then a linear layer.

    Attributes:
        width: of the hidden layers.
        out: K.
        doublings: how often the map's sides are doubled, each place four times.
    """

    width: int
    out: int
    doublings: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, h, w, D] -> [B, h · 2^doublings, w · 2^doublings, K], float32."""
        for i in range(self.doublings + 1):
            if i:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = Conv(self.width, 3, 1, 1, jnp.dtype('float32'), name=f'conv{i}')(x)
            x = nn.relu(batch_norm(train, name=f'norm{i}')(x))
        return nn.Dense(self.out, name='out')(x)


class Maps:
    """An encoder and heads on its last map, of which each has its share of the channels.

    Args:
        who: the method's name, for errors.
        encoder: gives 'map' or, on a grid that is as wide as the image, 'patches'.
        stride: of the places, pixels; where the map's is smaller, they are the map's. 0: the map's.
        width: of the heads' hidden layers.
        heads: K of each by its name; the first has the first share of the channels, and so on.
    """

    def __init__(
        self, who: str, encoder: models.Encoder, stride: int, width: int, heads: Mapping[str, int]
    ):
        self.who, self.chain, self.stride = who, Chain(encoder), stride
        self.width, self.heads = width, dict(heads)

    def init(self, key: jax.Array, images_BHWC: jax.Array) -> tuple[Tree, Tree]:
        """`(params, stats)`."""
        key, *keys = jax.random.split(key, 1 + len(self.heads))
        params, stats = self.chain.init(key, images_BHWC)
        named = self.chain.features(params, stats, images_BHWC)
        for (name, head, share), key in zip(self._heads(images_BHWC, named), keys, strict=True):
            params[name], stats[name] = models.init(head, key, share)
        return params, stats

    def __call__(
        self,
        params: Tree,
        stats: Tree,
        images_BHWC: jax.Array,
        *,
        train: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], Tree]:
        """The outputs of every head, [B, h, w, K], and the averages after this call."""
        out, new = self.chain(params, stats, images_BHWC, train=train, key=key)
        found = {}
        for name, head, share in self._heads(images_BHWC, out['named']):
            found[name], new[name] = models.apply(head, params[name], stats[name], share, train)
        return found, new

    def _heads(self, images_BHWC: jax.Array, named: dict[str, Any]) -> list[Any]:
        x_BhwD = feature_map(self.who, named, images_BHWC)
        side = images_BHWC.shape[1] // x_BhwD.shape[1]
        stride = self.stride or side
        doublings = max(0, round(math.log2(side / stride)))
        if side > stride and side != stride * 2**doublings:
            raise UserError(
                f'config.method.stride: got {stride}; {self.who} expects that of the map, {side} '
                'pixels, divided by a power of two.'
            )
        shares = jnp.split(x_BhwD, len(self.heads), axis=-1)
        return [
            (name, Places(self.width, out, doublings), share)
            for (name, out), share in zip(self.heads.items(), shares, strict=True)
        ]


def feature_map(who: str, named: dict[str, jax.Array], images_BHWC: jax.Array) -> jax.Array:
    """The last map of an encoder [B, h, w, D], from its outputs.

    Raises:
        UserError: it has none.
    """
    if 'map' in named:
        return named['map']
    patches_BND = named.get('patches')
    if patches_BND is None:
        raise UserError(
            f"config.model: {who} needs an encoder that gives 'map' or 'patches'; this one's "
            f'outputs are {tuple(named)}.'
        )
    B, N, D = patches_BND.shape
    side = round(math.sqrt(images_BHWC.shape[1] * images_BHWC.shape[2] / N))
    return patches_BND.reshape(B, -1, images_BHWC.shape[2] // side, D)


def middles(x_BHWC: jax.Array, map_BhwK: jax.Array) -> jax.Array:
    """The pixel in the middle of each place of a map, [B, h, w, C]."""
    down, right = (n // k for n, k in zip(x_BHWC.shape[1:3], map_BhwK.shape[1:3], strict=True))
    return x_BHWC[:, down // 2 :: down, right // 2 :: right]


def check_sees(
    who: str, encoder: models.Encoder, allowed: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    """The channels that the parts of an encoder of images in Lab see.

    A part that saw what its head is to say would have nothing to learn.

    Raises:
        UserError: it is no such encoder, or they see something else.
    """
    plain: Any = encoder
    while isinstance(plain, models.Microbatched | models.Pretrained):
        plain = plain.module
    sees: tuple[str, ...] = getattr(plain, 'sees', ())
    if sees not in allowed:
        got = f'sees={sees}' if sees else f'a {type(plain).__name__}'
        raise UserError(
            f"config.model: got {got}; {who} expects the model 'lab' with sees="
            f'{" or ".join(map(str, allowed))}.'
        )
    return sees
