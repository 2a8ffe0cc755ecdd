"""Network in Network (Lin et al. 2014, arXiv:1312.4400) as RotNet has it for CIFAR.

Gidaris et al. 2018, arXiv:1803.07728, and their code, gidariss/FeatureLearningRotNet.

Dimension key: B batch, H W image, C channels, h w map, D features.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax.config import UserError, check_range, choose, each
from contrastive_jax.layers.convolution import Conv
from contrastive_jax.layers.norm import batch_norm
from contrastive_jax.models.resnet import DTYPES

SIDES = 5, 5, 3  # of the first convolution in the first blocks; further ones are as the last


class Block(nn.Module):
    """A convolution and two of 1 x 1, each with BatchNorm and ReLU."""

    widths: Sequence[int]
    side: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, width in enumerate(self.widths, 1):
            side = self.side if i == 1 else 1
            x = Conv(width, side, 1, side // 2, self.dtype, name=f'conv{i}')(x)
            x = nn.relu(batch_norm(train, dtype=self.dtype, name=f'norm{i}')(x))
        return x


class NIN(nn.Module):
    """See `make`."""

    blocks: int
    widths: tuple[int, ...]
    width: int
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        block = nn.remat(Block, static_argnums=2) if self.remat else Block
        maps: list[jax.Array] = []
        for i in range(1, self.blocks + 1):
            widths = self.widths if i == 1 else (self.width,) * 3
            side = SIDES[min(i, len(SIDES)) - 1]
            x = block(widths, side, self.dtype, name=f'block{i}')(x, train)
            if i <= 2:
                # Padded here, as in models/resnet: 0 is no more than a ReLU's outputs, and counts
                # in the average, as in torch.
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                x = (nn.max_pool if i == 1 else nn.avg_pool)(x, (3, 3), strides=(2, 2))
            maps.append(x)
        x = x.astype(jnp.float32)
        named = [] if train else [y.astype(jnp.float32) for y in maps[:-1]]
        return x.mean(axis=(1, 2)), {**{f'block{i}': y for i, y in enumerate(named, 1)}, 'map': x}


def make(
    *,
    blocks: int = 4,
    widths: Sequence[int] = (192, 160, 96),
    width: int = 192,
    remat: bool = False,
    dtype: str = 'float32',
) -> NIN:
    """Blocks of three convolutions, the first k x k and two of 1 x 1, with BatchNorm and ReLU.

    k is 5 in the first two blocks and 3 in the others; a max-pool 3 x 3 of stride 2 ends the first
    block, an average-pool the second. Called as `module(x_BHWC, train)`, it returns the globally
    pooled features [B, D] and `{'map': [B, h, w, D]}`, float32, h = H / 4. With train=False there
    are also the maps after the other blocks, 'block1', 'block2', ...; the authors' conv2 is
    'block2'. BatchNorm as in models/resnet.

    Args:
        blocks: at least 2: 4 in the paper for learning rotations, 3 for learning classes, where in
            the authors' code the third ends with nothing, as here.
        widths: channels of the first block's three convolutions.
        width: D, channels of all others.
        remat: keep no activations within a block but compute them again for the gradient: less
            memory, a third more time.
        dtype: of the computation, 'float32' or 'bfloat16'. Parameters, batch statistics and the
            results are float32 in both.

    Raises:
        UserError: a value outside those.
    """
    where = 'config.model'
    check_range(where, {'blocks': blocks}, least=2, whole=True)
    check_range(where, {'width': width, **each('widths', widths)}, least=1, whole=True)
    if len(widths) != 3:
        raise UserError(f'{where}.widths: got {tuple(widths)}; expected three numbers.')
    return NIN(blocks, tuple(widths), width, remat, choose('dtype', dtype, DTYPES, where))
